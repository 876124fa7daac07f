"""`llama4 generate`: answer one question."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from llama4.arguments import PrintablePieces
from llama4.cli.options import add_chat_options, chat_options, load_model, load_pictures, opening
from llama4.errors import Llama4Error

if TYPE_CHECKING:
    from llama4.engine.replies import Reply


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="answer one question", description="Answer one question.")
    parser.add_argument("question", help="what to ask; - reads it from stdin")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture: path or URL; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object when the reply is complete")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat format")
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="with --raw: read names of special tokens in the text as these tokens",
    )
    parser.add_argument("--prefill", metavar="TEXT", help="beginning of the reply; what follows it is printed")
    add_chat_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    of_chat = ("image", "system", "prefill", "chat_template_kwargs", "chat_format")
    if options.raw and (given := [name for name in of_chat if getattr(options, name)]):
        options.parser.error(f"--raw continues a text; leave out --{given[0].replace('_', '-')}, which is of a chat")
    if options.special_tokens and not options.raw:
        options.parser.error("--special-tokens is for --raw; in a chat the prompt's format writes them")
    question = read_stdin() if options.question == "-" else options.question
    pictures = load_pictures(options, options.image)  # before the model, which takes longer
    content = [*({"type": "image", "image": each} for each in pictures), {"type": "text", "text": question}]
    llm = load_model(options)
    messages = [*opening(options), {"role": "user", "content": content}]
    if options.prefill is not None:
        messages.append({"role": "assistant", "content": options.prefill})
    prompt: Any = messages
    if options.raw:
        limit = llm.prompt_limit
        prompt = llm.processor.complete(question, special_tokens=options.special_tokens, limit=limit)
    stream = llm.stream(prompt, **chat_options(options))
    shown = PrintablePieces() if sys.stdout.isatty() else str
    for piece in stream:
        if not options.json:
            print(shown(piece), end="", flush=True)
    if options.json:
        print(json.dumps(as_json(stream.reply), ensure_ascii=False))
    else:
        end_reply(stream.reply)
    return 0


def read_stdin() -> str:
    """All of stdin, without the line break at its end.

    Raises:
        Llama4Error: it is not UTF-8.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise Llama4Error(
            f"stdin is not UTF-8: byte {data[error.start]:#04x} at {error.start}; convert it first, for instance with "
            "iconv -f latin1 -t utf-8"
        ) from None


def end_reply(reply: Reply) -> None:
    """End the line of a reply's text, and print its tool calls, one JSON object a line."""
    if reply.text or not reply.tool_calls:
        print()
    for call in reply.tool_calls:
        print(json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False))


def as_json(reply: Reply) -> dict[str, Any]:
    """A reply as `--json` prints it."""
    return {
        "text": reply.text,
        "tool_calls": [call.to_openai() for call in reply.tool_calls],
        "finish_reason": reply.finish_reason,
        "usage": dataclasses.asdict(reply.usage),
        "logprobs": [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in reply.logprobs],
    }
