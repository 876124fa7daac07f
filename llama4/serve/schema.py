"""What requests may say, as JSON Schema: one description checks them and is what /openapi.json shows.

`check` holds the keywords that these descriptions use, and no other; `Fields` are those of a route's body. An unknown
field is ignored, once with a line in the log; one that is a known one misspelt is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from llama4.serve.errors import RequestError

logger = logging.getLogger(__name__)

Schema: TypeAlias = Mapping[str, Any]

STRING: Schema = {"type": "string"}
TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}
ANYTHING: Schema = {}
MAX_ID = 2**31 - 1
MAX_DEPTH = 128
"""Objects and lists inside one another in a field: llguidance reads no deeper schemas, and templates indent them."""
_SHOWN = 80
"""Characters of a value in an error; of an unknown field's name, and how many of those are looked at."""
MAX_NOTICED = 1000
"""Names of unknown fields that are logged: who sends others would fill the log."""


def integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def number(least: float, most: float) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    limits: dict[str, Any] = {"minItems": least} if least else {}
    return {"type": "array", "items": items, **limits, **({"maxItems": most} if most is not None else {})}


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    return schema if NULL in schema.get("anyOf", ()) else any_of(schema, NULL)


def record(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    """An object; it may have other properties, too. Null is as if a property that is not required were absent."""
    shown = {name: each if name in required else maybe(each) for name, each in properties.items()}
    return {"type": "object", "properties": shown, **({"required": list(required)} if required else {})}


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: (
        not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
    ),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
}
_LIMITS: Mapping[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, limit: not _TYPES["number"](value) or value >= limit,
    "maximum": lambda value, limit: not _TYPES["number"](value) or value <= limit,
    "minLength": lambda value, limit: not isinstance(value, str) or len(value) >= limit,
    "maxLength": lambda value, limit: not isinstance(value, str) or len(value) <= limit,
    "minItems": lambda value, limit: not isinstance(value, list) or len(value) >= limit,
    "maxItems": lambda value, limit: not isinstance(value, list) or len(value) <= limit,
    "pattern": lambda value, limit: not isinstance(value, str) or re.search(limit, value) is not None,
    "enum": lambda value, limit: any(_is_same(value, each) for each in limit),
    "type": lambda value, limit: _TYPES[limit](value),
}


def check(value: Any, schema: Schema, at: str) -> Any:
    """A value as it counts: without properties that are null where `maybe` allows it.

    Raises:
        RequestError: a value that a schema does not allow, or half a character; `at` is its field.
    """
    _check_characters(value, at)
    if "anyOf" in schema:
        value = _check_any(value, schema, at)
    if not all(holds(value, schema[name]) for name, holds in _LIMITS.items() if name in schema):
        raise RequestError(f"{at} is {shown(value)}; it must be {wanted(schema)}", field=at)
    if isinstance(value, list):
        items = schema.get("items", ANYTHING)
        if not _are_ids(value, items):
            value = [check(item, items, f"{at}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                raise RequestError(f"{at}.{name} is missing", field=f"{at}.{name}")
        found = {}
        for name, own in value.items():
            _check_characters(name, at)
            if "propertyNames" in schema:
                check(name, schema["propertyNames"], at)
            inner = properties.get(name, schema.get("additionalProperties", ANYTHING))
            own = check(own, inner, f"{at}.{name:.80}")
            if own is not None or inner.get("anyOf", ())[1:] != [NULL]:
                found[name] = own
        return found
    return value


def _are_ids(values: list[Any], schema: Schema) -> bool:
    """Whether they are integers that a schema allows; a prompt may be millions, which one by one would take seconds."""
    if schema.get("type") != "integer" or set(map(type, values)) != {int}:
        return False
    return bool(schema["minimum"] <= min(values) and max(values) <= schema["maximum"])


def shown(value: Any) -> str:
    """The beginning of a value, as Python writes it; the rest of a long one is not looked at."""
    return f"{_begin(value)!r:.{_SHOWN}}"


def _begin(value: Any) -> Any:
    if isinstance(value, dict):
        return {_begin(name): _begin(own) for name, own in islice(value.items(), _SHOWN)}
    if isinstance(value, list):
        return [_begin(item) for item in value[:_SHOWN]]
    return value[:_SHOWN] if isinstance(value, str) else value


def _check_depth(value: Any, at: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        lists = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [inner for each in lists for inner in each]
        if not level:
            return
    message = f"{at} has more than {MAX_DEPTH} objects and lists inside one another; make it flatter"
    raise RequestError(message, field=at)


def _check_characters(value: Any, at: str) -> None:
    if isinstance(value, str) and not value.isascii() and re.search(r"[\ud800-\udfff]", value):
        raise RequestError(f"{at} has half of a surrogate pair, which is no character; send both halves", field=at)


def _check_any(value: Any, schema: Schema, at: str) -> Any:
    """`check` by one of several; if it is none of them, what is told is the error of the one whose `type` it has, or
    else the error furthest inside."""
    choices = schema["anyOf"]
    if isinstance(value, dict) and value.get("type") is not None and any(map(_kinds, choices)):
        check(value["type"], one_of(*(kind for each in choices for kind in _kinds(each))), f"{at}.type")
        choices = [each for each in choices if value["type"] in (_kinds(each) or [value["type"]])]
    errors: list[RequestError] = []
    for each in choices:
        try:
            return check(value, each, at)
        except RequestError as error:
            errors.append(error)
    deepest = max(errors, key=lambda error: len(re.findall(r"[.\[]", error.field or "")))
    if deepest.field != at:
        raise deepest
    raise RequestError(f"{at} is {shown(value)}; it must be {wanted(schema)}", field=at)


def known(value: Any, schema: Schema) -> Any:
    """A value that `check` has taken, without the properties that its schema does not name."""
    if "anyOf" in schema:
        choices = schema["anyOf"]
        if isinstance(value, dict):
            choices = [each for each in choices if value["type"] in _kinds(each)]
        else:
            choices = [each for each in choices if each.get("type") == "array"] if isinstance(value, list) else []
        return known(value, choices[0]) if choices else value
    if isinstance(value, list) and "items" in schema:
        return [known(each, schema["items"]) for each in value]
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        return {name: known(own, properties[name]) for name, own in value.items() if name in properties}
    return value


def _kinds(schema: Schema) -> Sequence[Any]:
    """What the `type` of an object may be."""
    kind = schema.get("properties", {}).get("type", {})
    kinds: Sequence[Any] = kind.get("anyOf", (kind,))[0].get("enum", ())
    return kinds


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def wanted(schema: Schema) -> str:
    """What a schema allows, in words."""
    if "description" in schema:
        return str(schema["description"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(wanted(each) for each in schema["anyOf"] if each != NULL))
    if "enum" in schema:
        values = [str(each) for each in schema["enum"]]
        return " or ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)
    kind, least, most = schema.get("type"), schema.get("minimum"), schema.get("maximum")
    if kind in ("integer", "number"):
        return f"{'an' if kind == 'integer' else 'a'} {kind} from {least} to {most}"
    if kind == "string":
        return "a string that is not empty" if schema.get("minLength") else "a string"
    if kind == "array":
        items = schema.get("items", ANYTHING)
        number_of = f"a list of up to {schema['maxItems']}" if "maxItems" in schema else "a list"
        number_of += " that is not empty" if schema.get("minItems") else ""
        return f"{number_of}, of each {wanted(items)}" if items else number_of
    return {"boolean": "true or false", "object": "an object", "null": "null"}.get(str(kind), "another value")


@dataclass(frozen=True)
class Field:
    """One field of a request. Null is as if it were absent.

    Attributes:
        schema: what it may be.
        default: its value where it is absent.
        is_required: whether it must be there.
        is_refused: whether it would change the reply in a way that is not there; `schema` allows what changes nothing.
        note: for the description.
        remedy: what to do about one that is refused.
    """

    schema: Schema
    default: Any = None
    is_required: bool = False
    is_refused: bool = False
    note: str = ""
    remedy: str = "leave it out"

    def to_json(self) -> dict[str, Any]:
        shown = dict(self.schema if self.is_required else maybe(self.schema))
        if self.default is not None:
            shown["default"] = self.default
        return {**shown, "description": self.note} if self.note else shown


def refused(*harmless: Any, remedy: str = "leave it out") -> Field:
    """A field that is known and not supported, except for values that change nothing."""
    return Field(one_of(*harmless) if harmless else NULL, is_refused=True, note="not supported", remedy=remedy)


def ignored(schema: Schema = ANYTHING) -> Field:
    return Field(schema, note="no effect")


def required(schema: Schema) -> Field:
    return Field(schema, is_required=True)


class Fields:
    """The fields of a route's body."""

    def __init__(self, name: str, /, **fields: Field) -> None:
        self.name, self.fields = name, fields
        self._spellings = {known: _spellings(known) for known in fields}

    def read(self, body: object) -> dict[str, Any]:
        """A body -> the value of every field.

        Raises:
            RequestError: a field that is missing, misspelt, or has a value that it cannot have.
        """
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        unknown = [name for name in body if name not in self.fields]
        for name in unknown[:_SHOWN]:
            if meant := self._meant(name):
                raise RequestError(f"{name} is not known; write {meant}", field=name, code="unknown_parameter")
        for name in unknown:
            if name not in _noticed and len(_noticed) < MAX_NOTICED:
                _noticed.add(name)
                logger.warning("requests have the field %.80r, which is not known, and is ignored", name)
        return {name: self._value(name, field, body.get(name)) for name, field in self.fields.items()}

    def _meant(self, name: str) -> str | None:
        """The field of which an unknown one is a misspelling: another case or other punctuation, or in names that are
        not short one character, or two neighbours that have changed places."""
        given = _spellings(name)
        alike = (field for field, own in self._spellings.items() if own & given and (len(own) > 1) == (len(given) > 1))
        return next(alike, None)

    def _value(self, name: str, field: Field, value: Any) -> Any:
        if value is None:
            if field.is_required:
                raise RequestError(f"{name} is missing", field=name)
            return field.default
        _check_depth(value, name)
        try:
            value = check(value, field.schema, name)
        except RequestError as error:
            if not field.is_refused:
                raise
            message = f"{name} is not supported; {field.remedy}"
            raise RequestError(message, field=error.field, code="unsupported_parameter") from None
        return int(value) if field.schema.get("type") == "integer" else value

    def to_json(self) -> dict[str, Any]:
        """Their JSON Schema."""
        needed = [name for name, field in self.fields.items() if field.is_required]
        return {
            "type": "object",
            "properties": {name: field.to_json() for name, field in self.fields.items()},
            **({"required": needed} if needed else {}),
        }


_noticed: set[str] = set()
_SHORT = 5
"""Characters of names in which another one makes another field: top_a is not top_k misspelt."""


def _spellings(name: str) -> set[str]:
    """A name without case and punctuation, and if it is not short, without one of its characters, too."""
    letters = re.sub(r"[_\W]", "", name[:_SHOWN]).lower()
    return {letters, *(letters[:i] + letters[i + 1 :] for i in range(len(letters)) if len(letters) > _SHORT)}
