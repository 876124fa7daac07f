"""`llama4 moderate`: is a message safe?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4.arguments import printable
from llama4.cli.generate import read_stdin
from llama4.cli.options import add_model_options, load_model, loading_options_given
from llama4.errors import ArgumentError, Llama4Error
from llama4.progress import starting
from llama4.reading import read_json, read_text

if TYPE_CHECKING:
    from llama4.text.guard import Moderation

UNSAFE = 3
"""Exit code where a message is unsafe; 0 is safe, 1 and 2 are errors, as of every command."""


def add_parser(commands: Any) -> None:
    about = (
        "Ask a Llama Guard whether a prompt, or the response to it, is safe, or a Prompt Guard whether a text attacks "
        f"a model. Exit code: 0 safe, {UNSAFE} unsafe, 1 or 2 an error."
    )
    parser = commands.add_parser("moderate", help="ask a Llama Guard or Prompt Guard", description=about)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Llama Guard or Prompt Guard: directory, GGUF file or Hub id, such as meta-llama/Llama-Guard-3-1B",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("text", nargs="?", metavar="TEXT", help="what a user says; - reads it from stdin")
    text.add_argument("--file", type=Path, metavar="FILE", help="file with the text")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="picture that goes with the text: path or URL; repeatable",
    )
    parser.add_argument("--response", metavar="TEXT", help="what an assistant answers, to be judged")
    parser.add_argument(
        "--category",
        action="append",
        type=_category,
        metavar="ID=NAME",
        help="category to ask for, in place of the model's own; repeatable",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="ID", help="category to leave out; repeatable"
    )
    parser.add_argument("--guard", metavar="NAME", help="version of Llama Guard, where its template does not say")
    parser.add_argument(
        "--third-party", action="store_true", help="for Prompt Guard: the text comes from a web page or a tool"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="probability from which a text is unsafe (default: 0.5)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    if options.file is None and options.text is None:
        options.parser.error(f"MODEL comes first, then TEXT or --file FILE; {options.model!r:.80} was taken as MODEL")
    if options.file is not None:
        text = read_text(options.file)
    else:
        text = read_stdin() if options.text == "-" else options.text
    found = _asked(options, text)
    if options.json:
        print(json.dumps(dataclasses.asdict(found), ensure_ascii=False))
    else:
        named = ", ".join(f"{category.id} {category.name}" for category in found.categories)
        verdict = "safe (unsafe: " if found.safe else "unsafe ("
        line = f"{verdict}{found.probability:.2f})" + (f": {named}" if named else "")
        print(printable(line))  # names are of the checkpoint's template
    return 0 if found.safe else UNSAFE


def _asked(options: argparse.Namespace, text: str) -> Moderation:
    if _is_prompt_guard(options):
        return _by_prompt_guard(options, text)
    if options.third_party:
        raise ArgumentError("--third-party is for Prompt Guard; leave it out")
    pictures = [{"type": "image", "image": image} for image in options.image]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
    if options.response is not None:
        messages.append({"role": "assistant", "content": options.response})
    return load_model(options).moderate(
        messages,
        categories=dict(options.category) if options.category else None,
        excluded=options.exclude,
        threshold=options.threshold,
        guard=options.guard,
    )


def _is_prompt_guard(options: argparse.Namespace) -> bool:
    """Whether config.json says so; Meta's layout and GGUF have none."""
    with starting():
        from llama4.weights import hub

    directory = hub.resolve(
        options.model,
        revision=options.revision,
        subfolder=options.subfolder,
        select=lambda layout: layout.config_files,
        progress=False,
    )
    path = directory / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "deberta-v2"


def _by_prompt_guard(options: argparse.Namespace, text: str) -> Moderation:
    of_llama_guard = {"image": options.image, "response": options.response, "category": options.category}
    for name, value in {**of_llama_guard, "exclude": options.exclude, "guard": options.guard}.items():
        if value:
            raise ArgumentError(f"--{name} is for Llama Guard; leave it out")
    try:
        from llama4.integrations.prompt_guard import PromptGuard
    except ImportError as error:
        if str(error.name).startswith("llama4"):
            raise
        raise Llama4Error("Prompt Guard needs transformers; run `pip install 'llama4[prompt-guard]'`") from None
    read = ("--revision", "--subfolder", "--device")
    if given := [name for name in loading_options_given(options) if name not in read]:
        raise ArgumentError(f"Prompt Guard is not loaded with {', '.join(given)}; leave it out")
    model = PromptGuard.from_pretrained(
        options.model, revision=options.revision, subfolder=options.subfolder, device=options.device
    )
    return model.moderate(text, threshold=options.threshold, third_party=options.third_party)


def _category(text: str) -> tuple[str, str]:
    """Raises:
    argparse.ArgumentTypeError: it is not ID=NAME.
    """
    id_, equals, name = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no category; write it as S1=Name")
    return id_, name
