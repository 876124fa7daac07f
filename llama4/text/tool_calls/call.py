"""A tool call, and the forms in which calls and tools are written in messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama4.errors import Llama4Error
from llama4.text.tool_calls.literals import as_json


def new_id() -> str:
    """Of a call, as OpenAI writes them."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True)
class ToolCall:
    """A function the model wants called."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=new_id, compare=False)

    def to_openai(self) -> dict[str, Any]:
        """The call as an entry of `tool_calls` in an assistant message."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def read_call(value: Any) -> ToolCall:
    """A call in OpenAI's form, in Meta's, or a `ToolCall`. Its arguments are what JSON holds.

    Raises:
        Llama4Error: it is none of them, or its arguments are not JSON.
    """
    if isinstance(value, ToolCall):
        value = {"name": value.name, "arguments": value.arguments, "id": value.id}
    call = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(call, Mapping):
        raise Llama4Error(f"{short(value)} is no tool call")
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments) if arguments.strip() else {}
        arguments = as_json(dict(arguments)) if isinstance(arguments, Mapping) else None
    except (ValueError, RecursionError):
        raise Llama4Error(f"the arguments of tool call {name!r} are not JSON: {short(arguments)}") from None
    if not isinstance(name, str) or not name or arguments is None:
        raise Llama4Error(f'a tool call needs a "name" and "arguments" that are a dictionary, this is {short(value)}')
    identity = value.get("id")
    return ToolCall(name, arguments, identity) if isinstance(identity, str) else ToolCall(name, arguments)


def function_name(tool: Mapping[str, Any]) -> str:
    """The name of the function in a tool's schema, which OpenAI wraps in {"type": "function", "function": ...}.

    Raises:
        Llama4Error: `tool` is no such schema.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise Llama4Error(
            f'{short(tool)} is no tool; it must be {{"type": "function", "function": {{"name": ..., '
            '"description": ..., "parameters": JSON schema}}'
        )
    return name


def check_tools(tools: Any) -> None:
    """Raises:
    Llama4Error: `tools` is no list of schemas.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise Llama4Error(f"tools are {short(tools)}; they must be a list of functions, each with its JSON schema")
    for tool in tools:
        name = function_name(tool)
        try:
            as_json(dict(tool))
        except (ValueError, RecursionError):
            raise Llama4Error(f"the tool {name!r:.80} holds what JSON does not: {short(tool)}") from None


def short(value: Any) -> str:
    """A value as error messages show it."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} of too many levels"
    return text if len(text) <= 80 else text[:77] + "..."
