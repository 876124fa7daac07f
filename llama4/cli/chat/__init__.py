"""`llama4 chat`: a conversation in the terminal, with a model here or at a server."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llama4.arguments import printable
from llama4.cli.chat.commands import COMMANDS, LEAVING, completions, help_text, run_command
from llama4.cli.chat.conversation import Conversation
from llama4.cli.chat.printing import make_printer
from llama4.cli.chat.reading import QUOTES, LineReader, make_reader
from llama4.cli.options import add_chat_options, chat_options, load_model, loading_options_given
from llama4.errors import ArgumentError, Llama4Error

if TYPE_CHECKING:
    from typing import Any

    from llama4.cli.chat.answers import Answerer

KEY = "LLAMA4_API_KEY"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat", help="talk in the terminal", description="Talk in the terminal. " + help_text()
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="MODEL", nargs="?", help="the same as --model")
    add_chat_options(parser)
    terminal = parser.add_argument_group("terminal")
    terminal.add_argument(
        "--server",
        metavar="URL",
        help="address of a server with OpenAI's API, to talk to its model in place of one here",
    )
    terminal.add_argument("--api-key", metavar="KEY", help=f"key for --server (default: ${KEY})")
    terminal.add_argument("--plain", action="store_true", help="print no colours and no Markdown, edit single lines")
    terminal.add_argument("--no-history", action="store_true", help="do not keep what was typed for the next time")
    parser.set_defaults(run=run, model=None)


def run(options: argparse.Namespace) -> int:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in some locales bytes that are not text would pass
    is_rich = not options.plain and os.environ.get("TERM", "dumb") != "dumb"
    is_interactive = sys.stdin.isatty()
    answerer = _answerer(options)
    printer = make_printer(is_terminal=is_interactive and sys.stdout.isatty(), is_rich=is_rich)
    conversation = Conversation(answerer, options.system, chat_options(options), printer)
    reader = make_reader(
        is_interactive=is_interactive,
        is_rich=is_rich and sys.stdout.isatty(),
        history=None if options.no_history else history_file(),
        complete=completions,
    )
    if is_interactive:
        print(f"{answerer.name}. /help shows what you can do, Ctrl-D leaves.")
    has_failed = False
    try:
        while (typed := read_message(reader, conversation)) is not None:
            try:
                _do(conversation, *typed)
            except KeyboardInterrupt:  # of a command, such as /image with an address
                if not is_interactive:
                    raise
                print("\n(stopped)")
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:  # the conversation goes on
                print(f"error: {printable(str(error))}", file=sys.stderr)
                has_failed = True
    finally:
        reader.close()
    return 1 if has_failed and not is_interactive else 0


def _answerer(options: argparse.Namespace) -> Answerer:
    from llama4.cli.chat.answers import Local, Remote

    if options.path is not None and options.model is not None:
        raise ArgumentError(f"the model is named twice, {options.path!r} and --model {options.model!r}; leave out one")
    options.model = options.path or options.model
    if options.server is None:
        if options.api_key is not None:
            raise ArgumentError("--api-key is for --server; a model here needs none")
        options.model = options.model or "tiny"
        local = Local(load_model(options), Path(options.model.rstrip("/")).name)
        local.check(chat_options(options))
        return local
    if given := loading_options_given(options):
        raise ArgumentError(f"the model of --server is loaded already; leave out {', '.join(given)}")
    return Remote(options.server, options.api_key or os.environ.get(KEY), options.model, options.private_host)


def history_file() -> Path:
    """Where what was typed is kept, for the arrow keys of the next time."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "llama4" / "chat_history"


def _do(conversation: Conversation, text: str, is_quoted: bool) -> None:
    name = "" if is_quoted else text.split(maxsplit=1)[0]
    if name in COMMANDS:
        told = run_command(conversation, name, text[len(name) :].strip())
        if told:
            print(told)
    elif name.startswith("/") and "/" not in name[1:]:
        raise ArgumentError(f"{name} is no command; /help shows those there are")
    else:
        conversation.ask(text)


def read_message(reader: LineReader, conversation: Conversation) -> tuple[str, bool] | None:
    """The next message or command, and whether it stood in quotes, so that it is no command; None where one leaves.
    Ctrl-C at a prompt starts another line."""
    while True:
        pictures = len(conversation.pictures)
        prompt = f"({pictures} picture{'s' * (pictures > 1)}) > " if pictures else "> "
        try:
            text = reader.read(prompt).strip()
            is_quoted = text.startswith(QUOTES)
            text = _in_quotes(reader, text) if is_quoted else text
        except EOFError:
            print(end="\n" if reader.is_interactive else "")
            return None
        except UnicodeDecodeError as error:
            raise Llama4Error(f"stdin is not UTF-8 ({error}); convert it first") from None
        except KeyboardInterrupt:
            if not reader.is_interactive:
                raise
            print("\n(Ctrl-D leaves)")
            continue
        if text in LEAVING and not is_quoted:
            return None
        if text:
            return text, is_quoted


def _in_quotes(reader: LineReader, line: str) -> str:
    """All lines between two `QUOTES`, of which the first begins this line."""
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(reader.read(". "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip()
