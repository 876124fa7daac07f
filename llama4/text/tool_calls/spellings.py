"""How a call may begin, as regular expressions; and a complete spelling -> the call."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NoReturn

from llama4.text.tool_calls.call import ToolCall
from llama4.text.tool_calls.literals import as_json, read_arguments, read_value

BUILT_IN = ("brave_search", "wolfram_alpha", "photogen")
"""Tools that Meta's models call as `name.call(query="...")` where a system message names them."""
CODE_INTERPRETER = "code_interpreter"
"""Meta's name of the tool that is called with code alone."""
START_MARKS = ("<|python_start|>", "<|python_tag|>")
"""What calls and code may follow; the second is Llama 3's, which has no end."""
END_MARK = "<|python_end|>"
MARKS = (*START_MARKS, END_MARK)

_BLANK = r"\s{0,64}"
_NAME = r"[^\W\d][\w.\-]{0,127}"
_IN_TAG = r"[^\s<>{}()\[\]]"
_TAG = re.compile(rf"<function=({_IN_TAG}+)>")
_KEYS = ("name", "type", "function", "parameters", "arguments", "id")


class Beginnings:
    """How calls begin.

    Args:
        known: names of the functions there are; None if any may be called.
        certain: whether the reply is one that may call tools. If that is not known, an object begins a call only if
            its first key is one of a call's.
        bare: whether a call without brackets counts, on a line of its own.

    Attributes:
        found: matches a beginning; the group that is named after the form begins where the call does.
        begun: matches the end of a text that may become a beginning.
        member: matches the beginning of a call in a list, up to its bracket.
        member_begun: matches a whole text that may become that.
    """

    def __init__(self, known: frozenset[str] | None, certain: bool, bare: bool) -> None:
        odd = [re.escape(name) for name in known or () if not re.fullmatch(_NAME, name)]
        name = f"(?:{'|'.join([*odd, _NAME])})"
        quote = "[\"']"
        key, key_begun = quote, ""
        if not certain:
            key, key_begun = f"{quote}{_any_of(_KEYS)}{quote}", f"(?:{quote}{_begun(_KEYS)}?)?"
        member_begun = f"(?:{name}{_BLANK})?"
        self.member = re.compile(rf"{name}{_BLANK}(?=\()|(?=\{{)")
        self.member_begun = re.compile(member_begun)

        forms = [  # name, what stands before, the beginning, what may become one
            (
                "list",
                r"(?<!\[)",
                rf"\[{_BLANK}(?:{name}{_BLANK}\(|\{{{_BLANK}{key})",
                rf"\[{_BLANK}(?:{member_begun}|\{{{_BLANK}{key_begun})",
            ),
            ("object", "", rf"\{{{_BLANK}{key}", rf"\{{{_BLANK}{key_begun}"),
            ("tag", "", rf"<function={_IN_TAG}{{1,128}}>", rf"{_begun(['<function='])}|<function={_IN_TAG}{{1,128}}"),
            ("mark", "", _any_of(MARKS), _begun(MARKS)),
        ]
        arguments = rf"\({_BLANK}(?:\)|{_NAME}{_BLANK}=(?=[^=]))"
        arguments_begun = rf"\({_BLANK}(?:{_NAME}{_BLANK}=?)?"
        built_in = [f"{tool}.call" for tool in BUILT_IN if known is None or tool in known]
        if built_in:
            names, names_begun = _any_of(built_in), _begun(built_in)
            forms.append(("built_in", r"(?<![\w.])", names + arguments, f"{names_begun}|{names}{arguments_begun}"))
        if bare and (known is None or known):
            names, names_begun = (_NAME, _NAME) if known is None else (_any_of(known), _begun(known))
            line = r"(?<=\n)[ \t;,]{0,64}"
            forms.append(("bare", line, names + arguments, f"(?:{names_begun})?|{names}{arguments_begun}"))
        self.found = re.compile("|".join(f"{before}(?P<{form}>{full})" for form, before, full, _ in forms))
        self.begun = re.compile("|".join(f"{before}(?:{begun})\\Z" for _, before, _, begun in forms))


beginnings = lru_cache(maxsize=64)(Beginnings)


def read_spelled(text: str, known: frozenset[str] | None) -> ToolCall | None:
    """The call that `text` spells: `{...}`, `<function=f>{...}` or `f(...)`; None if it is none, or of no known
    function, or with arguments that are not JSON."""
    try:
        if tag := _TAG.match(text):
            name, arguments = tag[1], _read_object(text[tag.end() :]) if tag.end() < len(text) else {}
        elif text.startswith("{"):
            name, arguments = _call_in(_read_object(text), known)
        else:
            bracket = text.index("(")
            name, (arguments, _) = text[:bracket].rstrip(), read_arguments(text, bracket)
        arguments = as_json(arguments)
    except ValueError:
        return None
    tool = name.removesuffix(".call")
    if (tool in BUILT_IN) if known is None else (name not in known):
        name = tool
    return ToolCall(name, arguments) if known is None or name in known else None


def is_code(text: str) -> bool:
    """Whether this is Python that does something, for all that can be known without running it. A value alone, such as
    a word or a list, is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string is the model's business
            statements = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    values = (ast.List, ast.Dict, ast.Set, ast.Tuple, ast.Name, ast.Constant)
    return any(not (isinstance(each, ast.Expr) and isinstance(each.value, values)) for each in statements)


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("too many levels") from None
    except ValueError:
        value, end = read_value(text)
        if text[end:].strip():
            raise
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _call_in(content: dict[str, Any], known: frozenset[str] | None) -> tuple[str, Any]:
    """Name and arguments in an object in Meta's form or OpenAI's."""
    inner = content.get("function")
    call = inner if isinstance(inner, dict) else content
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("no name")
    if "parameters" not in call and "arguments" not in call and not (known or call.get("type") == "function"):
        raise ValueError("neither parameters nor arguments")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = _read_object(arguments.strip() or "{}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no object")
    return name, arguments


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _any_of(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, words))})"


def _begun(words: Iterable[str]) -> str:
    """Matches the beginnings of words, none of which is empty; of long ones, more than that."""
    alternatives = []
    for word in words:
        head = word[:64]  # as regular expressions do not nest without end
        rest = r"\S{0,128}" if len(word) > len(head) else ""
        alternatives.append("(?:".join(map(re.escape, head)) + rest + ")?" * (len(head) - 1))
    return f"(?:{'|'.join(alternatives)})"
