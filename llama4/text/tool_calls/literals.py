"""Values as models write them in calls, in JSON, in Python, or between the two -> what JSON holds.

Nothing is evaluated: the grammar below is all there is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

DEEPEST = 100
"""Brackets inside brackets."""

_BLANK = re.compile(r"\s*")
_STRING = re.compile(r"([A-Za-z]{0,2})('''|\"\"\"|'|\")")
_BODY = {
    "'": re.compile(r"[^'\\]*(?:\\.[^'\\]*)*", re.DOTALL),
    '"': re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL),
    "'''": re.compile(r"[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*", re.DOTALL),
    '"""': re.compile(r'[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*', re.DOTALL),
}
_ESCAPE = re.compile(
    r"\\(?:([0-7]{1,3})|x([\da-fA-F]{2})|u([\da-fA-F]{4})|U([\da-fA-F]{8})|N\{([^{}]*)\}|(.))", re.DOTALL | re.ASCII
)
_ESCAPED = {"\n": "", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ESCAPED |= {quoted: quoted for quoted in "\\'\""}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"([+-]?)\s*([0-9.](?:[eE][+-]|[0-9A-Za-z_.])*)")
_WORD = re.compile(r"[A-Za-z_]\w*")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_PARAMETER = re.compile(r"([^\W\d][\w.\-]*)\s*=")


def read_value(text: str, at: int = 0, depth: int = DEEPEST) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends.

    Strings may hold raw line breaks. Tuples are lists.

    Raises:
        ValueError: there is no value, or one that JSON does not have (bytes, sets, complex numbers, `...`, variables).
    """
    at = _skip(text, at)
    opening = text[at : at + 1]
    if opening and opening in "[({":
        if not depth:
            raise ValueError("too deep")
        return _read_dict(text, at, depth - 1) if opening == "{" else _read_list(text, at, depth - 1)
    if _STRING.match(text, at):
        return _read_string(text, at)
    if number := _NUMBER.match(text, at):
        return _number(*number.groups()), number.end()
    word = _WORD.match(text, at)
    if word and word.group() in _WORDS:
        return _WORDS[word.group()], word.end()
    raise ValueError(f"no value at {at}")


def read_arguments(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The arguments of a call, all of them named, whose `(` stands at `at`, and where they end.

    Raises:
        ValueError: there are none, or others.
    """
    arguments: dict[str, Any] = {}
    at = _skip(text, at + 1)
    while text[at : at + 1] != ")":
        parameter = _PARAMETER.match(text, at)
        if parameter is None or parameter[1] in arguments:
            raise ValueError(f"no named argument at {at}, or its name comes twice")
        arguments[parameter[1]], at = read_value(text, parameter.end())
        at = _next_item(text, at, ")")
    return arguments, at + 1


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: keys are strings, all text is Unicode, numbers are finite.

    Raises:
        ValueError: JSON does not hold such a value.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # fails for half of a surrogate pair
        return json.loads(text)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _read_list(text: str, at: int, depth: int) -> tuple[Any, int]:
    """`[1, 2]`, `(1, 2)`; `(1)` is 1."""
    closing = "]" if text[at] == "[" else ")"
    items: list[Any] = []
    comma = False
    at = _skip(text, at + 1)
    while text[at : at + 1] != closing:
        item, at = read_value(text, at, depth)
        items.append(item)
        end = _skip(text, at)
        at = _next_item(text, at, closing)
        comma |= text[end] == ","
    return (items[0] if closing == ")" and len(items) == 1 and not comma else items), at + 1


def _read_dict(text: str, at: int, depth: int) -> tuple[dict[Any, Any], int]:
    content: dict[Any, Any] = {}
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = read_value(text, at, depth)
        at = _skip(text, at)
        if isinstance(key, (list, dict)) or text[at : at + 1] != ":":
            raise ValueError(f"no key of a dictionary before {at}")
        content[key], at = read_value(text, at + 1, depth)
        at = _next_item(text, at, "}")
    return content, at + 1


def _read_string(text: str, at: int) -> tuple[str, int]:
    """A string, or several that stand side by side."""
    pieces = []
    end = at
    while opening := _STRING.match(text, at):
        prefix, quote = opening[1].lower(), opening[2]
        body = _BODY[quote].match(text, opening.end())
        assert body is not None
        if prefix not in ("", "r", "u") or not text.startswith(quote, body.end()):
            raise ValueError(f"no string at {at}")
        pieces.append(body[0] if prefix == "r" else _ESCAPE.sub(_unescape, body[0]))
        end = body.end() + len(quote)
        at = _skip(text, end)
    joined = "".join(pieces)
    if _SURROGATE.search(joined):
        joined = joined.encode("utf-16", "surrogatepass").decode("utf-16")  # joins pairs, fails for halves
    return joined, end


def _unescape(escape: re.Match[str]) -> str:
    octal, x, u, long, name, character = escape.groups()
    if character is not None:
        return _ESCAPED.get(character, escape[0])
    if name is not None:
        try:
            return unicodedata.lookup(name)
        except KeyError:
            raise ValueError(f"{escape[0]} is no character") from None
    return chr(int(octal, 8) if octal else int(x or u or long, 16))


def _number(sign: str, digits: str) -> int | float:
    try:
        value: int | float = int(digits, 0)
    except ValueError:
        if not set(digits) & set(".eE"):
            raise
        value = float(digits)
    return -value if sign == "-" else value


def _next_item(text: str, at: int, closing: str) -> int:
    """Past a comma, or at the closing bracket."""
    at = _skip(text, at)
    if text[at : at + 1] == ",":
        return _skip(text, at + 1)
    if text[at : at + 1] != closing:
        raise ValueError(f"neither , nor {closing} at {at}")
    return at


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    assert blank is not None
    return blank.end()
