"""The text of a reply -> the tools it calls, and the forms in which calls and tools are written in messages."""

from __future__ import annotations

import ast
import json
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A function the model wants called."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)

    def to_openai(self) -> dict[str, Any]:
        """The call as an entry of `tool_calls` in an assistant message."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def parse_reply(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[str, list[ToolCall]]:
    """Split a reply into what it says and the tools it calls.

    A call is a JSON object with "name" and "parameters" (or "arguments"), a list of such objects, or a Python list such
    as `[f(a=1), g(b="x")]`, anywhere in the text, with or without `<|python_start|>` and `<|python_end|>`. Nothing is
    evaluated. What does not parse as a call stays text.

    Args:
        text: the decoded reply.
        tools: function schemas; if given, only calls of these functions count.
    """
    known = None if tools is None else {function_name(tool) for tool in tools}
    text = text.replace("<|python_start|>", "").replace("<|python_end|>", "")
    said: list[str] = []
    calls: list[ToolCall] = []
    start = at = 0
    while opening := _OPENING.search(text, at):
        found, at = _read_json_calls(text, opening.start()) or _read_python_calls(text, opening.start())
        if found and (known is None or all(call.name in known for call in found)):
            said.append(text[start : opening.start()])
            calls += found
            start = at
    if not calls:
        return text, []
    said.append(text[start:])
    kept = (piece for piece in said if piece.strip(" \t\r\n;,"))
    return _EMPTY_FENCE.sub("", "".join(kept)).strip(), calls


# What a call can begin with, so that other brackets cost nothing.
_OPENING = re.compile(r'\{\s*"|\[\s*(?:\{\s*"|[^\W\d][\w.]*\s*\()')
_EMPTY_FENCE = re.compile(r"```\w*\s*```")
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_DEEPEST = 100
_JSON = json.JSONDecoder()
_JSON_NAMES = {"true": True, "false": False, "null": None}


def _read_json_calls(text: str, start: int) -> tuple[list[ToolCall], int] | None:
    """Calls in the JSON value at `start` (none if it is another value), and where it ends; None if it is no JSON."""
    try:
        value, end = _JSON.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    try:
        return [read_call(item) for item in (value if isinstance(value, list) else [value])], end
    except ValueError:
        return [], end


def _read_python_calls(text: str, start: int) -> tuple[list[ToolCall], int]:
    """Calls in the Python list that begins at `start` (none if it is another value), and where to go on reading."""
    end = _closing_bracket(text, start)
    if end is None:
        return [], start + 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string is the model's business
            tree = ast.parse(text[start:end], mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return [], start + 1
    try:
        return [_read_python_call(node) for node in (tree.elts if isinstance(tree, ast.List) else [tree])], end
    except (ValueError, TypeError, MemoryError, RecursionError):
        return [], end


def _read_python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    name = ast.unparse(node.func)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("not a function's name")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("** in a call")
        arguments[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
    return ToolCall(name, arguments)


class _JsonNames(ast.NodeTransformer):
    """true, false and null, which models write in Python too, become True, False and None."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _closing_bracket(text: str, start: int) -> int | None:
    """The end of the bracketed expression that begins at `start`, or None if its brackets or quotes do not match."""
    expected: list[str] = []
    quote = ""
    skip = False
    for i in range(start, len(text)):
        character = text[i]
        if skip:
            skip = False
        elif quote:
            skip = character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
            if len(expected) > _DEEPEST:
                return None
        elif character in ")]}":
            if character != expected.pop():
                return None
            if not expected:
                return i + 1
    return None


def read_call(value: Any) -> ToolCall:
    """A call in OpenAI's form, in Meta's, or a `ToolCall`.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, ToolCall):
        return value
    call = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(call, Mapping):
        raise ValueError(f"{short(value)} is no tool call")
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"the arguments of tool call {name!r} are not JSON: {short(arguments)}") from None
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        raise ValueError(f'a tool call needs a "name" and "arguments" that are a dictionary, this is {short(value)}')
    identity = value.get("id")
    return ToolCall(name, dict(arguments), identity) if isinstance(identity, str) else ToolCall(name, dict(arguments))


def function_name(tool: Mapping[str, Any]) -> str:
    """The name of the function in a tool's schema, which OpenAI wraps in {"type": "function", "function": ...}.

    Raises:
        ValueError: `tool` is no such schema.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(
            f'{short(tool)} is no tool; it must be {{"type": "function", "function": {{"name": ..., '
            '"description": ..., "parameters": JSON schema}}'
        )
    return name


def short(value: Any) -> str:
    """A value as error messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
