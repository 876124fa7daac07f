"""`llama4 chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llama4.cli.generate import end_reply
from llama4.cli.options import add_chat_options, chat_options, load_model, opening
from llama4.errors import Llama4Error

if TYPE_CHECKING:
    from llama4.api import Llama4
    from llama4.options import Options

HELP = """\
Write a message and press Enter.
  /image FILE   add a picture to your next message
  /reset        start a new conversation
  /help         show this
  /quit         leave (so does Ctrl-D)
Ctrl-C stops a reply."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk in the terminal", description="Talk in the terminal. " + HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_chat_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in some locales bytes that are not text would pass
    interactive = sys.stdin.isatty()
    conversation = Conversation(load_model(options), opening(options), chat_options(options))
    if interactive:
        print("/help shows what you can do, Ctrl-D leaves.")
    while (line := _read_line(interactive)) is not None:
        command, _, argument = line.partition(" ")
        if command in ("/quit", "/exit"):
            break
        if command == "/reset":
            conversation.reset()
            print("A new conversation.")
        elif command == "/image":
            with _errors_printed():
                print(f"Added picture {conversation.add_picture(argument)} to your next message.")
        elif command == "/help" or (command.startswith("/") and "/" not in command[1:]):
            print(HELP if command == "/help" else f"{command} is no command; /help shows those there are.")
        elif line:
            with _errors_printed():
                conversation.ask(line)
    return 0


def _read_line(interactive: bool) -> str | None:
    """The next line, stripped; None at the end of the input. Ctrl-C at a prompt gives an empty line."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        print(end="\n" if interactive else "")
        return None
    except UnicodeDecodeError as error:
        raise Llama4Error(f"stdin is not UTF-8 ({error}); convert it first") from None
    except KeyboardInterrupt:
        if not interactive:
            raise
        print("\n(Ctrl-D leaves)")
        return ""


@contextlib.contextmanager
def _errors_printed() -> Iterator[None]:
    """An error in a conversation is printed and does not end it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)


class Conversation:
    """What was said, and the pictures of the message to come."""

    def __init__(self, llm: Llama4, opening: list[dict[str, Any]], options: Options) -> None:
        self.llm, self.opening, self.options = llm, opening, options
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.opening)
        self.pictures: list[dict[str, Any]] = []

    def add_picture(self, name: str) -> int:
        """Read a picture for the next message; returns how many it has now."""
        from llama4.vision.images import load_image

        name = name.strip().strip("'\"")
        if not name:
            raise Llama4Error("/image needs a file, such as /image photo.jpg")
        self.pictures.append({"type": "image", "image": load_image(name, self.llm.processor.image_limits)})
        return len(self.pictures)

    def ask(self, text: str) -> None:
        """Print the reply as it comes. After Ctrl-C the conversation has as much of it as was printed."""
        question = {"role": "user", "content": [*self.pictures, {"type": "text", "text": text}]}
        stream = None
        try:
            stream = self.llm.stream([*self.messages, question], **self.options)
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="" if stream else "\n")
        self.pictures = []
        if stream is not None:  # else Ctrl-C came before the first token
            reply = stream.reply
            end_reply(reply, " (cut at --max-new-tokens or the window)" if reply.finish_reason == "length" else "")
            answer: dict[str, Any] = {"role": "assistant", "content": reply.text}
            if reply.tool_calls:
                answer["tool_calls"] = [call.to_openai() for call in reply.tool_calls]
            self.messages += [question, answer]
