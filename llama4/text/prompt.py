"""Llama 4's prompt format: messages -> token ids.

The tokens are those of Meta's `ChatFormat`; the wording that announces tools is that of Meta's chat template for
Llama 4, as Hugging Face publishes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama4.text.messages import ImagePart, Message, ParsedMessage, read_messages
from llama4.text.tokenizer import Tokenizer
from llama4.text.tool_calls import function_name

_TOOLS_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


@dataclass(frozen=True)
class Rendered:
    """The token ids of a prompt, and for each whether it belongs to the assistant's messages (their text and the token
    that ends them), not to a header or another role."""

    ids: list[int]
    is_reply: list[bool]


def render(
    messages: Sequence[Message | ParsedMessage],
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
        add_generation_prompt: whether to end with the assistant's header, for the model to continue.

    Raises:
        ValueError: a message is not well formed, or there are more or fewer grids than images.
    """
    parsed = read_messages(messages)
    wanted = sum(isinstance(part, ImagePart) for message in parsed for part in message.parts)
    if wanted != len(grids):
        raise ValueError(
            f"the messages have places for {wanted} images, but {len(grids)} images were given; make them agree"
        )
    if tools:
        parsed = _announce(tools, parsed)
    remaining = iter(grids)
    ids = [tokenizer.bos_id]
    is_reply = [False]

    def write(tokens: list[int], reply: bool) -> None:
        ids.extend(tokens)
        is_reply.extend([reply] * len(tokens))

    for message in parsed:
        reply = message.role == "assistant"
        write(_header(message.role, tokenizer), False)
        for part in message.parts:
            if isinstance(part, ImagePart):
                write(image_tokens(*next(remaining), tokens_per_tile, tokenizer), reply)
            else:
                write(tokenizer.encode(part), reply)
        for call in message.tool_calls:
            content = {"type": "function", "name": call.name, "parameters": call.arguments}
            write(tokenizer.encode(json.dumps(content)), reply)
        end = "<|eom|>" if message.tool_calls or message.role == "ipython" else "<|eot|>"
        write([tokenizer.special(end)], reply)
    if add_generation_prompt:
        write(_header("assistant", tokenizer), False)
    return Rendered(ids, is_reply)


def image_tokens(rows: int, cols: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens an image stands for: its tiles row by row if there are several, then the global tile."""
    tile = [tokenizer.special("<|patch|>")] * tokens_per_tile
    ids = [tokenizer.special("<|image_start|>")]
    if rows * cols > 1:
        row = [*tile, *[tokenizer.special("<|tile_x_separator|>"), *tile] * (cols - 1)]
        ids += [*row, tokenizer.special("<|tile_y_separator|>")] * rows
    return [*ids, tokenizer.special("<|image|>"), *tile, tokenizer.special("<|image_end|>")]


def _announce(tools: Sequence[Mapping[str, Any]], messages: list[ParsedMessage]) -> list[ParsedMessage]:
    """Put the functions before the first user message, and say in a leading system message that there are tools."""
    for tool in tools:
        function_name(tool)  # raises if it is no schema
    listing = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    text = _TOOLS_INTRODUCTION + listing
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise ValueError("tools are announced in the first user message, but no message is a user's; add one")
    messages = list(messages)
    messages[first] = _prefixed(text, messages[first])
    if messages[0].role == "system":
        messages[0] = _prefixed("Environment: ipython\n", messages[0])
    return messages


def _prefixed(text: str, message: ParsedMessage) -> ParsedMessage:
    """The message with `text` before its content, as one text with it if that begins with text."""
    head, *rest = message.parts or ("",)
    parts = (text + head, *rest) if isinstance(head, str) else (text, *message.parts)
    return ParsedMessage(message.role, parts, message.tool_calls)


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    start, end = tokenizer.special("<|header_start|>"), tokenizer.special("<|header_end|>")
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]
