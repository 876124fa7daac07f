"""Messages in the form of Hugging Face and OpenAI, checked and brought into one form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from llama4.errors import Llama4Error
from llama4.text.tool_calls import ToolCall, read_call, short

Message: TypeAlias = Mapping[str, Any]
"""A message as users write it: "role", "content", perhaps "tool_calls"."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "function": "ipython",
    "ipython": "ipython",
}
"""A role as users write it -> its name in Llama 4's prompts. OpenAI's developer is a system, its function a tool."""


@dataclass(frozen=True)
class ImagePart:
    """An image in a message. `source` is what `load_image` reads; None for an image that is passed separately."""

    source: Any


@dataclass(frozen=True)
class ParsedMessage:
    """A message that has been checked.

    Attributes:
        role: its role in Llama 4's prompts.
        parts: its content, in order.
        tool_calls: the calls in it.
        given: the message as it was written, for a checkpoint's own template, which may read more of it.
    """

    role: str
    parts: tuple[str | ImagePart, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    given: Message = field(default_factory=dict, compare=False, repr=False)


def read_messages(messages: Sequence[Message | ParsedMessage]) -> list[ParsedMessage]:
    """Check messages and bring them into one form; those that have it already are kept.

    Raises:
        Llama4Error: a message is not well formed; the text has its number and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise Llama4Error(
            f"messages is a {type(messages).__name__}; it must be a list of messages, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise Llama4Error("the list of messages is empty; give at least one user message")
    return [_read_message(message, f"message {i}") for i, message in enumerate(messages)]


def is_continued(messages: Sequence[ParsedMessage]) -> bool:
    """Whether a reply goes on with the last message, where nobody says: if it is the assistant's and calls no tools."""
    return messages[-1].role == "assistant" and not messages[-1].tool_calls


def picture_parts(messages: object) -> Iterator[Mapping[str, Any]]:
    """The parts of messages that are pictures; they need not be well formed, nor be messages."""
    if isinstance(messages, Mapping):
        kind = messages.get("type")
        if isinstance(kind, str) and "image" in kind:
            yield messages
        else:
            yield from picture_parts(messages.get("content"))
    elif isinstance(messages, (list, tuple)):
        for each in messages:
            yield from picture_parts(each)


def is_fetched(picture: object) -> bool:
    """Whether a part, or what it holds, is the address of a picture elsewhere."""
    if isinstance(picture, Mapping):
        return any(map(is_fetched, picture.values()))
    return isinstance(picture, str) and picture[:8].lower().startswith(("http://", "https://"))


def image_sources(messages: Iterable[ParsedMessage]) -> list[Any]:
    """The sources of all images, in order; None for a placeholder."""
    return [part.source for message in messages for part in message.parts if isinstance(part, ImagePart)]


def image_places(messages: Iterable[ParsedMessage]) -> list[tuple[int, int]]:
    """Where all images are, in order: the number of the message, and that of the part in it."""
    parts = ((i, j, part) for i, message in enumerate(messages) for j, part in enumerate(message.parts))
    return [(i, j) for i, j, part in parts if isinstance(part, ImagePart)]


def _read_message(message: Message | ParsedMessage, where: str) -> ParsedMessage:
    if isinstance(message, ParsedMessage):
        return message
    if not isinstance(message, Mapping):
        raise Llama4Error(f'{where} is a {type(message).__name__}; it must be a dictionary with "role" and "content"')
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Llama4Error(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    role = ROLES[role]
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
        raise Llama4Error(f"{where} of role {role!r} has tool_calls; only the assistant calls tools")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise Llama4Error(f"the tool_calls of {where} are {short(calls)}; they must be a list")
    try:
        tool_calls = tuple(read_call(call) for call in calls)
    except ValueError as error:
        raise Llama4Error(f"{where}: {error}") from None

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
        raise Llama4Error(f"{where} has the content {short(content)}; it must be a string or a list of parts")
    if role == "user" and not any(isinstance(part, ImagePart) or part.strip() for part in parts):
        raise Llama4Error(f"{where} is empty; write a question, or add an image")
    return ParsedMessage(role, parts, tool_calls, message)


def _read_part(part: Any, where: str) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text"):
        if isinstance(part.get("text"), str):
            return str(part["text"])
        raise Llama4Error(f'{where} has the text {short(part.get("text"))}; it must be a string under "text"')
    if kind == "image":
        for key in ("image", "url", "path", "data"):
            if part.get(key) is not None:
                return ImagePart(part[key])
        if isinstance(part.get("base64"), str):
            return ImagePart(f"data:;base64,{part['base64']}")
        return ImagePart(None)
    if kind in ("image_url", "input_image"):
        link = part.get("image_url")
        url = link.get("url") if isinstance(link, Mapping) else link
        if isinstance(url, str):
            return ImagePart(url)
        raise Llama4Error(f'{where} has the image_url {short(link)}; it must be {{"url": "https://..."}}')
    raise Llama4Error(
        f'{where} is {short(part)}; a part is {{"type": "text", "text": ...}}, {{"type": "image", "image": ...}} '
        'or {"type": "image_url", "image_url": {"url": ...}}'
    )
