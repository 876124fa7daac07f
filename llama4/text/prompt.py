"""Prompts: messages -> pieces of text and special tokens -> token ids. `compose` is Llama 4's format; a checkpoint's
own chat template (template.py) is another way to the same pieces.

The tokens are those of Meta's `ChatFormat`; the wording that announces tools is that of Meta's chat template for
Llama 4, as Hugging Face publishes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama4.errors import Llama4Error
from llama4.patterns import longest_of
from llama4.text.messages import ImagePart, Message, ParsedMessage, read_messages
from llama4.text.prompt_limit import PromptLimit
from llama4.text.tokenizer import Tokenizer
from llama4.text.tool_calls import ToolCall, check_tools
from llama4.text.tool_calls.spellings import BUILT_IN, CODE_INTERPRETER

IMAGE = "<|image|>"
"""The special token that stands in a prompt's pieces for a whole image."""
IMAGE_END = "<|image_end|>"
"""The last of the tokens that Llama 4 has in its place."""

_FORMAT = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_IN_USER_MESSAGE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
)
_IN_SYSTEM_MESSAGE = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt.

    Attributes:
        text: what it says; its characters are text, whatever they are, unless `special`.
        special: it is one special token, whose name is `text`.
        reply: ranges (start, end) of `text` that belong to the assistant's messages.
        blank: whether the vocabularies of Llama 1 and 2 put a blank before it, as they do before a text.
    """

    text: str
    special: bool = False
    reply: tuple[tuple[int, int], ...] = ()
    blank: bool = True


@dataclass(frozen=True)
class Marks:
    """The special tokens that stand around messages.

    Attributes:
        header: before and after the name of a role.
        turn, message: at the end of a message, and of one after which more comes from the same side: a call of tools.
        after_tool: at the end of a tool's answer.
        code: before code for an interpreter, and calls of tools that need no announcing; None where calls are JSON.
    """

    header: tuple[str, str]
    turn: str
    message: str
    after_tool: str
    code: str | None = None


LLAMA4 = Marks(("<|header_start|>", "<|header_end|>"), "<|eot|>", "<|eom|>", "<|eom|>")


@dataclass(frozen=True)
class Rendered:
    """The token ids of a prompt, and for each whether it belongs to the assistant's messages (their text and the token
    that ends them), not to a header or another role."""

    ids: list[int]
    is_reply: list[bool]


def compose(
    messages: Sequence[Message | ParsedMessage],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tools_in_user_message: bool = True,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    bos: str = "<|begin_of_text|>",
    marks: Marks = LLAMA4,
) -> list[Piece]:
    """Messages -> the pieces of Llama 4's prompt, or of Llama 3's.

    `<|begin_of_text|>`, then per message `<|header_start|>`role`<|header_end|>` and two line breaks, its content, and
    `<|eot|>` (`<|eom|>` after a tool's answer and after a message that calls tools), then the assistant's header.

    Args:
        messages: as users write them, or what `read_messages` made of them.
        tools: function schemas in OpenAI's form.
        tools_in_user_message: whether they are announced at the start of the first user message, or in the system
            message.
        add_generation_prompt: whether to end with the assistant's header, for the model to continue.
        continue_final_message: whether to end within the last message instead.
        bos: name of the first token.
        marks: what stands around messages.

    Raises:
        Llama4Error: a message is not well formed, there is no message to announce tools in, or none to continue.
    """
    parsed = read_messages(messages)
    if continue_final_message:
        check_continued(parsed)
    if tools:
        parsed = _announce(tools, parsed) if tools_in_user_message else _announce_to_system(tools, parsed)
    pieces = [Piece(bos, special=True)]

    def write(text: str, reply: bool, special: bool = False) -> None:
        pieces.append(Piece(text, special, ((0, len(text)),) if reply else ()))

    for message in parsed:
        reply = message.role == "assistant"
        pieces += _header(message.role, marks)
        for part in message.parts:
            if isinstance(part, ImagePart):
                write(IMAGE, reply, special=True)
            else:
                write(part, reply)
        for call in message.tool_calls:
            if marks.code is not None and (spelled := _built_in(call)) is not None:
                write(marks.code, reply, special=True)
                write(spelled, reply)
            else:
                write(json.dumps({"type": "function", "name": call.name, "parameters": call.arguments}), reply)
        end = marks.message if message.tool_calls else marks.after_tool if message.role == "ipython" else marks.turn
        write(end, reply, special=True)
    if continue_final_message:
        pieces.pop()
    elif add_generation_prompt:
        pieces += _header("assistant", marks)
    return pieces


def check_continued(messages: Sequence[ParsedMessage]) -> None:
    """Raises:
    Llama4Error: the last message is one that cannot be continued.
    """
    if messages[-1].tool_calls:
        raise Llama4Error("the last message calls tools, so it cannot be continued; leave continue_final_message out")


def check_images(places: int, given: int) -> None:
    """Raises:
    Llama4Error: a prompt has more or fewer places for images than there are.
    """
    if places != given:
        raise Llama4Error(f"the prompt has places for {places} images, but {given} images were given; make them agree")


def encode(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    grids: Sequence[tuple[int, int]] = (),
    tokens_per_tile: int = 144,
    picture_ids: Callable[[int, int, int, Tokenizer], list[int]] | None = None,
    limit: PromptLimit | None = None,
) -> Rendered:
    """Pieces -> token ids.

    Args:
        grids: (rows, cols) of tiles for each image, in the order in which the images come.
        tokens_per_tile: `<|patch|>` tokens per tile.
        picture_ids: what an image stands for; by default `image_tokens`.
        limit: how many tokens there may be. What surely has more is not read, or not to its end; what has a few more
            is, for others to say how many.

    Raises:
        ContextLengthError: there surely are more than `limit` allows.
        Llama4Error: there are more or fewer grids than images; the tokenizer lacks a special token.
    """
    pieces = list(pieces)
    most = math.inf
    if limit is not None:
        most = limit.most + _FEW
        limit.check(sum(1 if piece.special else tokenizer.fewest(piece.text) for piece in pieces), at_least=True)
    check_images(sum(piece.special and piece.text == IMAGE for piece in pieces), len(grids))
    remaining = iter(grids)
    ids: list[int] = []
    is_reply: list[bool] = []
    for piece in pieces:
        if not piece.special:
            tokens = tokenizer.encode(piece.text, blank=piece.blank, most=most - len(ids))
        elif piece.text == IMAGE:
            tokens = (picture_ids or image_tokens)(*next(remaining), tokens_per_tile, tokenizer)
        else:
            tokens = [tokenizer.bos_id if piece.text == tokenizer.bos else tokenizer.special(piece.text)]
        ids += tokens
        if limit is not None and len(ids) > most:
            limit.check(len(ids), at_least=True)
        if piece.special or piece.reply in ((), ((0, len(piece.text)),)):
            is_reply += [bool(piece.reply)] * len(tokens)
        else:
            is_reply += _overlaps(piece, tokens, tokenizer)
    return Rendered(ids, is_reply)


_FEW = 1 << 16
"""Tokens beyond a limit that are read nevertheless, so that the error tells the whole number."""


def special_names(tokenizer: Tokenizer) -> re.Pattern[str]:
    """What finds the names of special tokens in a text; of two that begin at the same place, the longer."""
    return re.compile(longest_of(tokenizer.special_tokens) if tokenizer.special_tokens else "(?!)")


def read_pieces(text: str, tokenizer: Tokenizer) -> list[Piece]:
    """A prompt that is rendered already -> its pieces: every name of a special token is one."""
    pieces, at = [], 0
    for match in special_names(tokenizer).finditer(text):
        pieces += [Piece(text[at : match.start()]), Piece(match.group(), special=True)]
        at = match.end()
    return [piece for piece in (*pieces, Piece(text[at:])) if piece.text]


def _overlaps(piece: Piece, tokens: Iterable[int], tokenizer: Tokenizer) -> list[bool]:
    """For each token of a text, whether some of its bytes belong to a reply."""
    ranges = [(len(piece.text[:a].encode()), len(piece.text[:b].encode())) for a, b in piece.reply]
    lengths = [len(tokenizer.decode_bytes([token])) for token in tokens]
    result, start = [], len(piece.text.encode()) - sum(lengths)  # below 0 where a blank was put before it
    for length in lengths:
        end = start + length
        result.append(any(a < end and start < b for a, b in ranges))
        start = end
    return result


def render(
    messages: Sequence[Message | ParsedMessage],
    tokenizer: Tokenizer,
    *,
    grids: Sequence[tuple[int, int]] = (),
    tokens_per_tile: int = 144,
    **options: Any,
) -> Rendered:
    """Messages -> token ids in Llama 4's format: `compose` with its options, then `encode`.

    Raises:
        Llama4Error: as those.
    """
    return encode(compose(messages, bos=tokenizer.bos, **options), tokenizer, grids, tokens_per_tile)


def image_tokens(rows: int, cols: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens an image stands for: its tiles row by row if there are several, then the global tile."""
    tile = [tokenizer.special("<|patch|>")] * tokens_per_tile
    ids = [tokenizer.special("<|image_start|>")]
    if rows * cols > 1:
        row = [*tile, *[tokenizer.special("<|tile_x_separator|>"), *tile] * (cols - 1)]
        ids += [*row, tokenizer.special("<|tile_y_separator|>")] * rows
    return [*ids, tokenizer.special(IMAGE), *tile, tokenizer.special(IMAGE_END)]


def _listing(tools: Sequence[Mapping[str, Any]]) -> str:
    check_tools(tools)
    return "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)


def _announce(tools: Sequence[Mapping[str, Any]], messages: Sequence[ParsedMessage]) -> list[ParsedMessage]:
    """Put the functions before the first user message, and say in a leading system message that there are tools."""
    text = _IN_USER_MESSAGE + _FORMAT + _listing(tools)
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise Llama4Error("tools are announced in the first user message, but no message is a user's; add one")
    messages = list(messages)
    messages[first] = _prefixed(text, messages[first])
    if messages[0].role == "system":
        messages[0] = _prefixed("Environment: ipython\n", messages[0])
    return messages


def _announce_to_system(tools: Sequence[Mapping[str, Any]], messages: Sequence[ParsedMessage]) -> list[ParsedMessage]:
    """Put the functions before the leading system message, or into one of their own."""
    text = "Environment: ipython\n" + _IN_SYSTEM_MESSAGE + _FORMAT + _listing(tools)
    if messages[0].role == "system":
        return [_prefixed(text, messages[0]), *messages[1:]]
    return [ParsedMessage("system", (text,)), *messages]


def _prefixed(text: str, message: ParsedMessage) -> ParsedMessage:
    """The message with `text` before its content, as one text with it if that begins with text."""
    head, *rest = message.parts or ("",)
    parts = (text + head, *rest) if isinstance(head, str) else (text, *message.parts)
    return replace(message, parts=parts)


def _header(role: str, marks: Marks) -> list[Piece]:
    start, end = marks.header
    return [Piece(start, True), Piece(role), Piece(end, True), Piece("\n\n")]


def _built_in(call: ToolCall) -> str | None:
    """A call of the interpreter, or of a tool that Meta's models know, as Llama 3.1 spells it; None for others."""
    if call.name == CODE_INTERPRETER and call.arguments.keys() == {"code"}:
        return str(call.arguments["code"])
    if call.name in BUILT_IN and call.arguments.keys() == {"query"}:
        return f"{call.name}.call(query={json.dumps(call.arguments['query'], ensure_ascii=False)})"
    return None
