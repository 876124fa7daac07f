"""Which tools the model may call, and whether it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama4.errors import ArgumentError
from llama4.text.json_schema import moved
from llama4.text.tool_calls.call import check_tools, function_name, short

Tools = Sequence[Mapping[str, Any]]


def chosen_tools(
    tools: Tools | None, choice: str | Mapping[str, Any] | None
) -> tuple[Tools | None, dict[str, Any] | None]:
    """The tools that the model is told of, and the JSON schema of the call that its reply must be, None if it is free.

    Args:
        choice: "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.

    Raises:
        ArgumentError: another choice, or one of a tool that is not there.
    """
    if choice is None or choice == "auto":
        return tools, None
    if choice == "none":
        return None, None
    if not tools:
        raise ArgumentError(f"tool_choice is {short(choice)}, but there are no tools; give some")
    check_tools(tools)
    if choice == "required":
        return tools, {"anyOf": [_call(tool, f"#/anyOf/{i}") for i, tool in enumerate(tools)]}
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        wanted = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
        raise ArgumentError(f"tool_choice is {short(choice)}; it must be {wanted}")
    named = [tool for tool in tools if function_name(tool) == name]
    if not named:
        names = ", ".join(map(function_name, tools))
        raise ArgumentError(f"tool_choice names {name!r:.80}, which is none of the tools ({names})")
    return tools, _call(named[0], "#")


def _call(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A call of a tool as Llama 4 writes it; `place` is where this stands in the whole schema."""
    parameters = moved(
        tool.get("function", tool).get("parameters") or {"type": "object"}, f"{place}/properties/parameters"
    )
    return {
        "type": "object",
        "properties": {"name": {"const": function_name(tool)}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
