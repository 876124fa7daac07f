"""What a chat template is given: messages and other values of JSON's types alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama4.errors import Llama4Error
from llama4.text.messages import ROLES, ImagePart, ParsedMessage
from llama4.text.tool_calls import ToolCall

_ROLES = {"developer": "system", "function": "tool"}
_TYPES = "text image function object array string number integer boolean null"
_KEYS = (
    "role content type text image name function arguments parameters properties items required description enum id "
    "tool_calls tool_call_id reasoning_content thinking reasoning title"
)
_REASONING = ("reasoning_content", "thinking", "reasoning")


def as_given(message: ParsedMessage, strings: bool, parts: bool) -> dict[str, Any]:
    """A message as templates read it.

    Args:
        strings: whether the template takes a string; else its content becomes a list of parts.
        parts: whether parts that are all text stay parts; else they become one string.
    """
    given = message.given
    role = given.get("role", "tool" if message.role == "ipython" else message.role)
    result: dict[str, Any] = {"role": _ROLES.get(role, role)}
    content = given.get("content")
    if isinstance(content, Mapping):
        result["content"] = plain(content)
    elif content is not None or (message.parts and not given):
        texts = [part for part in message.parts if isinstance(part, str)]
        whole = isinstance(content, str) or not parts
        if len(texts) == len(message.parts) and strings and whole:
            result["content"] = "".join(texts)
        else:
            result["content"] = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part}
                for part in message.parts
            ]
    if message.tool_calls:
        raw = given.get("tool_calls") or [None] * len(message.tool_calls)
        result["tool_calls"] = [
            ({"id": call.id} if isinstance(each, ToolCall) or (isinstance(each, Mapping) and each.get("id")) else {})
            | {"type": "function", "function": {"name": call.name, "arguments": plain(call.arguments)}}
            for call, each in zip(message.tool_calls, raw, strict=True)
        ]
    rest = (key for key, value in given.items() if value is not None and key not in ("role", "content", "tool_calls"))
    result |= {key: plain(given[key]) for key in rest}
    reasoning = next((result[key] for key in _REASONING if key in result), None)
    if reasoning is not None:
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    return result


def plain(value: Any) -> Any:
    """A value as a template may see it: of JSON's types alone; a picture, say, is the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Mapping):
        return {key if type(key) is str else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def disguised_in(value: Any, disguise: Mapping[int, int], key: str = "") -> Any:
    """A value with other characters in the users' strings; what templates ask for keeps its own."""
    if isinstance(value, str):
        fixed = value in {"role": ROLES, "type": _TYPES.split()}.get(key, ())
        return value if fixed else value.translate(disguise)
    if isinstance(value, dict):
        return {
            name if name in _KEYS.split() or not isinstance(name, str) else name.translate(disguise): disguised_in(
                item, disguise, str(name)
            )
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [disguised_in(item, disguise, key) for item in value]
    return value


def with_end(messages: list[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """The messages with `end` behind the last text of the last one."""
    *others, last = messages
    content = last.get("content")
    if isinstance(content, list) and content and "text" in content[-1]:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + end}]
    elif isinstance(content, str):
        content += end
    else:
        raise Llama4Error(
            "the last message ends with no text, so it cannot be continued; leave continue_final_message out"
        )
    return [*others, {**last, "content": content}]
