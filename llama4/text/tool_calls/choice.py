"""Which tools the model may call, and whether it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urldefrag, urljoin

from llama4.errors import ArgumentError
from llama4.text.tool_calls.call import check_tools, function_name, short

Tools = Sequence[Mapping[str, Any]]


def chosen_tools(
    tools: Tools | None, choice: str | Mapping[str, Any] | None
) -> tuple[Tools | None, dict[str, Any] | None]:
    """The tools that the model is told of, empty where it may call none; and the JSON schema of the call that its reply
    must be, None if it is free.

    Args:
        choice: "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.

    Raises:
        ArgumentError: another choice, one of a tool that is not there, or of one whose parameters are no object.
    """
    if choice is None or choice == "auto":
        return tools, None
    if choice == "none":
        return (), None
    if not tools:
        raise ArgumentError(f"tool_choice is {short(choice)}, but there are no tools; give some")
    check_tools(tools)
    if choice == "required":
        return tools, {"anyOf": [_call(tool, i) for i, tool in enumerate(tools)]}
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        wanted = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
        raise ArgumentError(f"tool_choice is {short(choice)}; it must be {wanted}")
    named = [tool for tool in tools if function_name(tool) == name]
    if not named:
        names = ", ".join(map(function_name, tools))
        raise ArgumentError(f"tool_choice names {name!r:.80}, which is none of the tools ({names})")
    return tools, _call(named[0])


def free_call(tools: Tools) -> dict[str, Any]:
    """The JSON schema of a call of any tool, with arguments as free as where a reply has no form."""
    check_tools(tools)
    return {
        "type": "object",
        "properties": {"name": {"enum": [*map(function_name, tools)]}, "parameters": {"type": "object"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _call(tool: Mapping[str, Any], number: int = 0) -> dict[str, Any]:
    """A call of a tool as Llama 4 writes it. Where its schema says nothing but properties, there are no others."""
    name = function_name(tool)
    given = tool.get("function", tool).get("parameters") or {}
    kind = given.get("type", "object") if isinstance(given, Mapping) else given
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        remedy = "a call has an object, so put it into a property of one"
        raise ArgumentError(f"the schema of a tool ({name!r:.80}) is of type {short(kind)}; {remedy}")
    parameters = as_resource({**given, "type": "object"}, f"https://{number}.tool/")
    properties: Any = given.get("properties")
    required: Any = given.get("required", [])
    are_names = isinstance(required, list | tuple) and all(isinstance(each, str) for each in required)
    if are_names and isinstance(properties, Mapping) and given.keys() <= _PLAIN and {*required} <= {*properties}:
        parameters["additionalProperties"] = False
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def as_resource(schema: Mapping[str, Any], address: str) -> dict[str, Any]:
    """A schema to stand in another one. With an address that nothing else there has, references and names in it are its
    own.

    Raises:
        ArgumentError: its `$id` is no address.
    """
    identity = schema.get("$id")
    try:
        own, anchor = urldefrag(identity if isinstance(identity, str) else "")
        resource = {**schema, "$id": urljoin(address, own)}
    except ValueError as error:
        raise ArgumentError(f"the $id of a schema is {identity!r:.80}, which is no address: {error}") from None
    if anchor:  # as names were written before 2019
        resource.setdefault("$anchor", anchor)
    resource.pop("$schema", None)  # before 2019, $id beside $ref was nothing
    return resource


_PLAIN = {
    "type",
    "properties",
    "required",
    "title",
    "description",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "$comment",
}
"""Keywords of a schema of which all properties are known."""
