"""`llama4 serve`: answer behind an address, in OpenAI's form and Anthropic's, and to a page."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama4.arguments import PrintableFormatter
from llama4.cli.options import FROM_PRETRAINED, add_model_options, load_model
from llama4.errors import ArgumentError, Llama4Error
from llama4.files import user_path
from llama4.progress import starting


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer over HTTP",
        description="Answer behind an address, in OpenAI's form and Anthropic's, and to a page in a browser.",
    )
    parser.add_argument("model", metavar="MODEL", help="embedded name, directory, GGUF file or Hub id")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, help="port to listen at; 0 for a free one (default: 8000)")
    server.add_argument(
        "--api-key", metavar="KEY", help="key that clients must send (default: $LLAMA4_API_KEY, or none)"
    )
    server.add_argument(
        "--served-model-name", metavar="NAME", help="name of the model for clients (default: MODEL's last part)"
    )
    server.add_argument(
        "--max-batch", type=int, default=64, metavar="N", help="conversations computed at once (default: 64)"
    )
    server.add_argument(
        "--cache-memory", default="4GiB", metavar="SIZE", help="memory for all keys and values (default: 4GiB)"
    )
    server.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait (default: 256)")
    server.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="origin whose web pages may call this server; repeatable",
    )
    server.add_argument(
        "--allow-host",
        dest="url_hosts",
        action="append",
        default=[],
        metavar="HOST",
        help="host that image URLs may be of; * for all public; repeatable",
    )
    server.add_argument("--allow-urls", dest="url_hosts", action="append", help=argparse.SUPPRESS)
    server.add_argument(
        "--media-directory", type=Path, metavar="DIR", help="directory that file:// image URLs may read"
    )
    server.add_argument(
        "--store",
        type=Path,
        metavar="FILE",
        help="file to keep responses in until they are deleted: it grows (default: the last 1,000, in memory)",
    )
    server.add_argument(
        "--ssl-certfile", type=Path, metavar="FILE", help="certificate, to serve by HTTPS; with --ssl-keyfile"
    )
    server.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="key of the certificate")
    server.add_argument("--no-page", dest="page", action="store_false", help="serve no web page for chatting at /")
    server.add_argument("--verbose", action="store_true", help="log every request, without its text")
    model = add_model_options(parser, {name: each for name, each in FROM_PRETRAINED.items() if name != "adapter"})
    model.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an adapter that requests may name as their model; repeatable",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        with starting():
            from llama4.serve.app import Server, Settings
            from llama4.serve.engine import Engine
            from llama4.serve.run import Address, listening_at
            from llama4.serve.run import run as serve
            from llama4.serve.settings import check_names
    except ModuleNotFoundError as error:
        if str(error.name).startswith("llama4"):
            raise
        raise Llama4Error(f"the package {error.name} is missing; run `pip install 'llama4[serve]'`") from None

    (handler := logging.StreamHandler()).setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if options.verbose else logging.WARNING)
    if (options.ssl_certfile is None) != (options.ssl_keyfile is None):
        raise ArgumentError("--ssl-certfile and --ssl-keyfile belong together; give both or none")
    for name, value in (("--queue", options.queue), ("--max-batch", options.max_batch)):
        if value < 1:
            raise ArgumentError(f"{name} is {value}; it must be at least 1")
    if options.api_key == "":
        raise ArgumentError("--api-key is empty, so anybody could ask; give a key, or leave the option out")
    key = options.api_key or os.environ.get("LLAMA4_API_KEY") or None
    if key is not None and (key != key.strip() or not key.isprintable()):
        raise ArgumentError("the API key has blanks or line breaks around it, or what no header holds; take them out")
    for origin in options.cors_origin:
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
            raise ArgumentError(f"--cors-origin {origin} is no origin; give http://NAME or http://NAME:PORT, or *")
    if options.media_directory is not None and not options.media_directory.is_dir():
        raise ArgumentError(f"--media-directory {options.media_directory} is no directory")
    settings = Settings(
        name=options.served_model_name or Path(os.path.abspath(options.model)).name,
        api_key=key,
        cors_origins=tuple(options.cors_origin),
        url_hosts=tuple(options.url_hosts),
        media_directory=options.media_directory,
        has_page=options.page,
        store=options.store,
    )
    adapters = adapters_of(options.adapters)
    check_names(settings.name, adapters)
    address = Address(options.host, options.port, options.ssl_certfile, options.ssl_keyfile)
    with listening_at(address) as listening:
        print(f"llama4: loading {options.model}", file=sys.stderr, flush=True)
        llm = load_model(options)
        for name, directory in adapters.items():
            llm.adapters.add(name, directory)
        server = Server(Engine(llm, options.cache_memory, options.max_batch, options.queue), settings)
    serve(server, address, listening)
    return 0


def adapters_of(given: Sequence[str]) -> dict[str, Path]:
    """Directories by name. What can be known of them without the model is checked.

    Raises:
        ArgumentError: one without a name, or a name twice.
        ConfigError, CheckpointError: a directory that holds no adapter, or one of a kind that is not computed.
    """
    from llama4.adapters.files import read_config

    found: dict[str, Path] = {}
    for each in given:
        name, is_named, directory = each.partition("=")
        if not is_named or not name or not directory:
            raise ArgumentError(f"--adapter {each} has no name or no directory; write --adapter NAME=DIR")
        if name in found:
            raise ArgumentError(
                f"--adapter has the name {name} twice, for {found[name]} and {directory}; give each a name of its own"
            )
        found[name] = user_path(directory)
        read_config(found[name])
    return found
