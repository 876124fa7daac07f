"""Values from a configuration file, of the kind that a dataclass says its fields are."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from llama4.errors import ConfigError
from llama4.reading import LIMITS, MAX_INT


def read_fields(cls: type, content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What an object in a file says of a dataclass's fields.

    Args:
        place: the file, and the object in it, for errors.

    Raises:
        ConfigError: a value of another kind, or out of all bounds.
    """
    kinds = _kinds(cls)
    return {name: read_value(kinds[name], value, name, place) for name, value in content.items() if name in kinds}


def section(content: Mapping[str, Any], name: str, place: str) -> Mapping[str, Any]:
    """An object in an object; {} if it is absent or null.

    Raises:
        ConfigError: it is something else.
    """
    value = content.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(value, name, place, "an object")
    return value or {}


def read_value(kind: Any, value: Any, name: str, place: str) -> Any:
    """Raises:
    ConfigError: a value of another kind, or out of all bounds.
    """
    if kind is int:
        return _whole(value, name, place)
    if kind is float:
        return _number(value, name, place)
    if kind is bool:
        if value is not None and not isinstance(value, (bool, int)):
            raise _wrong(value, name, place, "true or false")
        return bool(value)
    if kind is str:
        if not isinstance(value, str):
            raise _wrong(value, name, place, "a text")
        return value
    if typing.get_origin(kind) is types.UnionType:
        (other,) = (each for each in typing.get_args(kind) if each is not type(None))
        return None if value is None else read_value(other, value, name, place)
    assert typing.get_origin(kind) is tuple, "fields of other kinds are read by hand"
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, name, place, "a list")
    return tuple(read_value(typing.get_args(kind)[0], each, name, place) for each in value)


@cache
def _kinds(cls: type) -> dict[str, Any]:
    kinds = typing.get_type_hints(cls)
    return {field.name: kinds[field.name] for field in dataclasses.fields(cls)}


def _whole(value: Any, name: str, place: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(value, name, place, "a whole number")
    if abs(value) > (limit := LIMITS.get(name, MAX_INT)):
        raise _wrong(value, name, place, f"at most {limit:,}")
    return value


def _number(value: Any, name: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(value, name, place, "a number")
    if value != 0 and not (1e-300 <= abs(value) <= 1e300 and math.isfinite(value)):
        raise _wrong(value, name, place, "zero or at least 1e-300" if abs(value) < 1 else "a finite number")
    return float(value)


def _wrong(value: Any, name: str, place: str, wanted: str) -> ConfigError:
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return ConfigError(f"{place} has {name} = {text}, which must be {wanted}; correct it, or fetch the file again")
