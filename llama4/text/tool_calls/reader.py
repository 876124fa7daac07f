"""The text of a reply, as it comes -> what it says and the tools it calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama4.text.tool_calls.call import ToolCall, check_tools, function_name
from llama4.text.tool_calls.finder import Finder, Found, Mark, Piece
from llama4.text.tool_calls.spellings import CODE_INTERPRETER, END_MARK, is_code

_BETWEEN_CALLS = " \t\r\n;,"
_FENCE = re.compile(r"\s*```\w*\s*\Z")
_FENCE_BEGUN = re.compile(r"(\s*)(?:`{1,2}|```\w*\s*)?\Z")
_END_OF_FENCE = re.compile(r"\s*```")
_END_OF_FENCE_BEGUN = re.compile(r"\s*`{0,2}")


def names_of(tools: Sequence[Mapping[str, Any]] | None) -> frozenset[str] | None:
    """The names of functions that may be called; None for any.

    Raises:
        Llama4Error: a schema without a name.
    """
    if tools is None:
        return None
    check_tools(tools)
    return frozenset(map(function_name, tools))


class CallReader:
    """Reads a reply as it comes. What it returns does not depend on how the text is cut, and comes as soon as it is
    certain: text that may be the beginning of a call is held back, and a call comes when it is complete.

    A call is `{"name": ..., "parameters": {...}}` or with "arguments", a list of such objects, a list
    `[f(a=1), g(b="x")]`, `<function=f>{...}</function>`, `brave_search.call(query="x")` for one of Meta's built-in
    tools, or a call of a known function alone on its line, anywhere in the text, with or without `<|python_start|>` and
    `<|python_end|>`; code between these calls `code_interpreter`. Nothing is evaluated. What is no call, or one whose
    arguments are not JSON, stays text; calls beside it are kept.

    Args:
        known: names of the functions that may be called; None for any.
        certain: whether the reply is known to be one that may call tools. If not, it is read as text until a mark
            (`<|python_start|>`) comes; only calls at its very end count, if it ends as one that calls tools.
    """

    def __init__(self, known: frozenset[str] | None = None, *, certain: bool = True) -> None:
        self._known = known
        self._certain = certain
        self._finder = self._new_finder()
        self._said = _Said()
        self._code: list[Piece] | None = None  # what came after a mark, while it may be code
        self._last: list[Piece] = []  # calls that count if nothing more is said, and what came since
        self._out: list[str | ToolCall] = []

    def push(self, text: str) -> list[str | ToolCall]:
        """Take more text; return what is said and called for certain."""
        self._add(self._finder.push(text))
        return self._take()

    def mark(self, name: str) -> list[str | ToolCall]:
        """Take a special token of `MARKS`."""
        self._add(self._finder.finish())
        self._certain = True
        self._finder = self._new_finder()
        self._pass_mark(name)
        return self._take()

    def finish(self, calls_tools: bool = False) -> list[str | ToolCall]:
        """The rest of a reply that has ended, if `calls_tools` as one that calls tools (`<|eom|>`)."""
        self._add(self._finder.finish())
        self._end_code()
        self._end_last(calls_tools)
        self._out.append(self._said.finish())
        return self._take()

    def _new_finder(self) -> Finder:
        return Finder(self._known, certain=self._certain, bare=self._certain and self._known is not None)

    def _take(self) -> list[str | ToolCall]:
        out, self._out = self._out, []
        return [piece for piece in out if piece != ""]

    def _add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Mark) and self._certain:
                self._pass_mark(piece.spelled)
            elif self._code is None:
                self._accept(piece)
            else:
                self._code.append(piece)
                if _calls([piece]) and not _says(self._code):
                    self._end_code()  # it begins with a call, so it is no code

    def _pass_mark(self, name: str) -> None:
        self._end_code()
        self._end_last(True)
        if name != END_MARK and (self._known is None or CODE_INTERPRETER in self._known):
            self._code = []

    def _end_code(self) -> None:
        """What came after a mark is calls and what is said around them; or else code; or else text."""
        pieces, self._code = self._code or [], None
        says, calls = _says(pieces), _calls(pieces)
        spelled = "".join(map(_spelled, pieces))
        if (says or not calls) and is_code(spelled):
            pieces = [Found(spelled, ToolCall(CODE_INTERPRETER, {"code": spelled.strip()}))]
            if self._known is None:  # functions that were announced in the text may be called without brackets, too
                finder = Finder(None, bare=True)
                found = [*finder.push(spelled), *finder.finish()]
                pieces = found if _calls(found) and not _says(found) else pieces
        for piece in pieces:
            self._accept(piece)

    def _accept(self, piece: Piece) -> None:
        if self._certain:
            self._put(piece)
        elif isinstance(piece, Found) or (self._last and not _spelled(piece).strip(_BETWEEN_CALLS + "`")):
            self._last.append(piece)
        else:
            self._end_last(False)
            self._put(_spelled(piece))

    def _end_last(self, are_calls: bool) -> None:
        pieces, self._last = self._last, []
        for piece in pieces:
            self._put(piece if are_calls else _spelled(piece))

    def _put(self, piece: Piece) -> None:
        if isinstance(piece, Found):
            if piece.call:
                self._said.call()
                self._out.append(piece.call)
            self._out.append(self._said.say(piece.left))
        else:
            self._out.append(self._said.say(_spelled(piece)))


def _spelled(piece: Piece) -> str:
    return piece if isinstance(piece, str) else piece.spelled


def _says(pieces: Iterable[Piece]) -> bool:
    return any(isinstance(piece, str) and piece.strip(_BETWEEN_CALLS) for piece in pieces)


def _calls(pieces: Iterable[Piece]) -> bool:
    return any(isinstance(piece, Found) and piece.call for piece in pieces)


class _Said:
    """Text without calls. Blanks at its ends, and separators and fences around nothing but calls, go with the calls; a
    text without calls stays as it is."""

    def __init__(self) -> None:
        self._calls = False
        self._speaks = False  # ever
        self._goes_on = False  # since the last call
        self._before = ""  # held back, of what stands before the last call
        self._held = ""  # held back, of what stands behind it
        self._blanks = 0  # at its beginning, as a model may well write thousands

    def say(self, text: str) -> str:
        """Take more text; return what is certain to stay."""
        self._held += text
        if not self._goes_on and (fence := _FENCE.search(self._before)):
            if end := _END_OF_FENCE.match(self._held):
                self._before, self._held = self._before[: fence.start()], self._held[end.end() :]
                self._blanks = 0
            elif _END_OF_FENCE_BEGUN.fullmatch(self._held):
                return ""
        open_end = _FENCE_BEGUN.search(self._held, self._blanks)
        assert open_end is not None
        certain = open_end.start() if open_end.start() > self._blanks else 0
        text = self._held[:certain]
        if not self._goes_on and not text.strip(_BETWEEN_CALLS):
            self._blanks = 0 if certain else open_end.end(1)
            return ""
        self._held, self._blanks = self._held[certain:], open_end.end(1) - certain
        text = self._before + text
        text = text.lstrip() if self._calls and not self._speaks else text
        self._before, self._goes_on, self._speaks = "", True, True
        return text

    def call(self) -> None:
        """A call stands here."""
        self._before += self._held if self._goes_on else self._held.lstrip(_BETWEEN_CALLS)
        self._held, self._blanks, self._goes_on, self._calls = "", 0, False, True

    def finish(self) -> str:
        """The rest, once no more text comes."""
        if not self._calls:
            return self._held
        before = _FENCE.sub("", self._before)
        text = before + (self._held if self._goes_on else self._held.lstrip(_BETWEEN_CALLS))
        return (text if self._speaks else text.lstrip()).rstrip()
