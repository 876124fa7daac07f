"""Which keywords of a JSON schema hold schemas, and how a schema becomes a part of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
"""Keywords of schemas by name."""
DATA = {"enum", "const", "default", "examples"}
"""Keywords of no schemas."""


def moved(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A schema as a part of another, where it stands at `place` (`#/properties/a`): its references, which go from its
    root, lead there."""
    inside = _moved(schema, place)
    inside.pop("$id", None)  # from which its references would go
    return inside


def _moved(node: Any, place: str) -> Any:
    if isinstance(node, list):
        return [_moved(child, place) for child in node]
    if not isinstance(node, Mapping):
        return node
    found: dict[str, Any] = {}
    for keyword, value in node.items():
        if keyword in NAMED and isinstance(value, Mapping):
            found[keyword] = {name: _moved(each, place) for name, each in value.items()}
        elif keyword == "$ref" and isinstance(value, str) and (value in ("", "#") or value.startswith("#/")):
            found[keyword] = place + value[1:]
        else:
            found[keyword] = value if keyword in DATA else _moved(value, place)
    return found
