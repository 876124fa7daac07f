"""Llama 4's prompt format: messages -> token ids.

Messages come in the form of Hugging Face and OpenAI. The tokens are those of Meta's `ChatFormat`; the wording that
announces tools is that of Meta's chat template for Llama 4, as Hugging Face publishes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llama4.text.tokenizer import Tokenizer
from llama4.text.tool_calls import ToolCall, function_name, parse_reply, read_call, short

__all__ = [
    "ImagePart",
    "Message",
    "Rendered",
    "ToolCall",
    "Turn",
    "image_sources",
    "image_tokens",
    "parse_reply",
    "read_messages",
    "render",
]

Message: TypeAlias = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool", "ipython")

_TOOLS_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


@dataclass(frozen=True)
class ImagePart:
    """An image in a message: where it comes from, or None for one that is handed over separately."""

    source: Any


@dataclass(frozen=True)
class Turn:
    """A message that has been checked: its role in the prompt, its parts in order, and its tool calls."""

    role: str
    parts: tuple[str | ImagePart, ...]
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """Token ids of a prompt and, in parallel, whether the assistant wrote the token (its text and what ends it)."""

    ids: list[int]
    is_reply: list[bool]


def render(
    messages: Sequence[Message | Turn],
    tokenizer: Tokenizer,
    *,
    grids: Sequence[tuple[int, int]] = (),
    tokens_per_tile: int = 144,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> Rendered:
    """Messages -> token ids.

    `<|begin_of_text|>`, then per message `<|header_start|>`role`<|header_end|>` and two line breaks, its content, and
    `<|eot|>` (`<|eom|>` after a tool's answer and after a message that calls tools), then the assistant's header.

    Args:
        messages: as users write them, or what `read_messages` made of them.
        grids: (rows, cols) of tiles for each image, in the order in which the images come.
        tokens_per_tile: `<|patch|>` tokens per tile.
        tools: function schemas in OpenAI's form; they are announced at the start of the first user message.
        add_generation_prompt: whether to end with the assistant's header, for the model to go on from.
    Raises:
        ValueError: a message is not well formed, or there are more or fewer grids than images.
    """
    turns = read_messages(messages)
    wanted = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    if wanted != len(grids):
        raise ValueError(
            f"the messages have places for {wanted} images, but {len(grids)} images were given; make them agree"
        )
    if tools:
        turns = _announce(tools, turns)
    remaining = iter(grids)
    ids = [tokenizer.special("<|begin_of_text|>")]
    is_reply = [False]

    def write(tokens: list[int], reply: bool) -> None:
        ids.extend(tokens)
        is_reply.extend([reply] * len(tokens))

    for turn in turns:
        reply = turn.role == "assistant"
        write(_header(turn.role, tokenizer), False)
        for part in turn.parts:
            if isinstance(part, ImagePart):
                write(image_tokens(*next(remaining), tokens_per_tile, tokenizer), reply)
            else:
                write(tokenizer.encode(part), reply)
        for call in turn.tool_calls:
            spelt = {"type": "function", "name": call.name, "parameters": call.arguments}
            write(tokenizer.encode(json.dumps(spelt)), reply)
        end = "<|eom|>" if turn.tool_calls or turn.role == "ipython" else "<|eot|>"
        write([tokenizer.special(end)], reply)
    if add_generation_prompt:
        write(_header("assistant", tokenizer), False)
    return Rendered(ids, is_reply)


def image_tokens(rows: int, cols: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens that hold an image's place: its tiles row by row if there are several, then the image as a whole."""
    tile = [tokenizer.special("<|patch|>")] * tokens_per_tile
    ids = [tokenizer.special("<|image_start|>")]
    if rows * cols > 1:
        row = [*tile, *[tokenizer.special("<|tile_x_separator|>"), *tile] * (cols - 1)]
        ids += [*row, tokenizer.special("<|tile_y_separator|>")] * rows
    return [*ids, tokenizer.special("<|image|>"), *tile, tokenizer.special("<|image_end|>")]


def read_messages(messages: Sequence[Message | Turn]) -> list[Turn]:
    """Check messages and bring them into one form; what is in it already stays.

    Raises:
        ValueError: with the number of the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages is a {type(messages).__name__}; it must be a list of messages, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise ValueError("the list of messages is empty; give at least one user message")
    return [_read_message(message, f"message {i}") for i, message in enumerate(messages)]


def image_sources(turns: Iterable[Turn]) -> list[Any]:
    """The sources of all images, in order; None for a placeholder."""
    return [part.source for turn in turns for part in turn.parts if isinstance(part, ImagePart)]


def _read_message(message: Message | Turn, where: str) -> Turn:
    if isinstance(message, Turn):
        return message
    if not isinstance(message, Mapping):
        raise ValueError(f'{where} is a {type(message).__name__}; it must be a dictionary with "role" and "content"')
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    role = "ipython" if role == "tool" else role
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
        raise ValueError(f"{where} of role {role!r} has tool_calls; only the assistant calls tools")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"the tool_calls of {where} are {short(calls)}; they must be a list")
    try:
        tool_calls = tuple(read_call(call) for call in calls)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

    content = message.get("content")
    if content is None:
        content = [] if tool_calls else content
    elif role == "ipython" and isinstance(content, Mapping):
        content = json.dumps(content)
    if isinstance(content, str):
        parts: tuple[str | ImagePart, ...] = (content,)
    elif isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        parts = tuple(_read_part(part, f"part {i} of {where}") for i, part in enumerate(content))
    else:
        raise ValueError(f"{where} has the content {short(content)}; it must be a string or a list of parts")
    if role == "user" and not any(isinstance(part, ImagePart) or part.strip() for part in parts):
        raise ValueError(f"{where} is empty; write a question, or add an image")
    return Turn(role, parts, tool_calls)


def _read_part(part: Any, where: str) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if isinstance(part.get("text"), str):
            return str(part["text"])
        raise ValueError(f'{where} has the text {short(part.get("text"))}; it must be a string under "text"')
    if kind == "image":
        for key in ("image", "url", "path", "data"):
            if part.get(key) is not None:
                return ImagePart(part[key])
        if isinstance(part.get("base64"), str):
            return ImagePart(f"data:;base64,{part['base64']}")
        return ImagePart(None)
    if kind == "image_url":
        link = part.get("image_url")
        url = link.get("url") if isinstance(link, Mapping) else link
        if isinstance(url, str):
            return ImagePart(url)
        raise ValueError(f'{where} has the image_url {short(link)}; it must be {{"url": "https://..."}}')
    raise ValueError(
        f'{where} is {short(part)}; a part is {{"type": "text", "text": ...}}, {{"type": "image", "image": ...}} '
        'or {"type": "image_url", "image_url": {"url": ...}}'
    )


def _announce(tools: Sequence[Mapping[str, Any]], turns: list[Turn]) -> list[Turn]:
    """Put the functions before the first user message, and say in a leading system message that there are tools."""
    for tool in tools:
        function_name(tool)  # or an error
    listing = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    text = _TOOLS_INTRODUCTION + listing
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise ValueError("tools are announced in the first user message, but no message is a user's; add one")
    turns = list(turns)
    turns[first] = _prefixed(text, turns[first])
    if turns[0].role == "system":
        turns[0] = _prefixed("Environment: ipython\n", turns[0])
    return turns


def _prefixed(text: str, turn: Turn) -> Turn:
    """The turn with `text` before its content, as one text with it if that begins with text."""
    head, *rest = turn.parts or ("",)
    parts = (text + head, *rest) if isinstance(head, str) else (text, *turn.parts)
    return Turn(turn.role, parts, turn.tool_calls)


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    start, end = tokenizer.special("<|header_start|>"), tokenizer.special("<|header_end|>")
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]
