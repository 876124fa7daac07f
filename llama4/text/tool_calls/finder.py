"""Text as it comes -> stretches of text, and calls."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from llama4.text.tool_calls.call import ToolCall
from llama4.text.tool_calls.literals import DEEPEST
from llama4.text.tool_calls.spellings import beginnings, read_spelled

LONGEST = 1 << 20
"""Characters of one call; what is longer is text."""
PART = 4096
"""Characters that are taken at a time, as what is open is copied when a part of it is settled."""

_BRACKET_OR_QUOTE = re.compile(r"[\[\](){}'\"]")
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_END_OF_STRING = {quote: re.compile(r"\\|" + quote) for quote in ("'", '"', "'''", '"""')}

T = TypeVar("T")
Reading: TypeAlias = Generator[None, None, T]
"""Reads on, stops where the text ends (`yield`), and goes on when more has come."""


@dataclass(frozen=True, slots=True)
class Found:
    """A stretch of text that spells a call, or belongs to calls."""

    spelled: str
    call: ToolCall | None = None
    left: str = ""
    """What of it is text all the same: members of a list that are no calls."""


@dataclass(frozen=True, slots=True)
class Mark:
    """`<|python_start|>` and its like, as a model spells them."""

    spelled: str


Piece: TypeAlias = str | Found | Mark


class Finder:
    """Finds calls in text that comes in parts, however it is cut. The pieces that it returns spell the text again, in
    order; each comes as soon as it is certain.

    Args: those of `Beginnings`.
    """

    def __init__(self, known: frozenset[str] | None, *, certain: bool = True, bare: bool = False) -> None:
        self._known = known
        self._beginnings = beginnings(known, certain, bare)
        self._text = "\n"  # from `_at` on it is open; one character before that is kept
        self._at = 1
        self._ended = False
        self._limit = 0  # where the text of a call has become too long
        self._skip = 0  # up to where brackets are too deep, or the text too long, for a call
        self._pieces: list[Piece] = []
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str) -> list[Piece]:
        """Take more text; return what is certain now."""
        for start in range(0, len(text), PART):
            self._text += text[start : start + PART]
            next(self._reading)
        return self._take()

    def finish(self) -> list[Piece]:
        """The rest, once no more text comes."""
        self._ended = True
        for _ in self._reading:
            pass
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read(self) -> Reading[None]:
        while True:
            found = self._beginnings.found.search(self._text, self._at)
            if found is None and self._ended:
                return self._settle_text(len(self._text))
            if found is None:
                begun = self._beginnings.begun.search(self._text, self._at)
                self._settle_text(begun.start() if begun else len(self._text))
                yield
                continue
            form = found.lastgroup
            assert form is not None
            spelled = found[form]
            self._settle_text(found.start(form))
            if form == "mark":
                self._settle(self._at + len(spelled), Mark(spelled))
            elif form == "list":
                yield from self._read_list()
            elif form == "tag":
                yield from self._read_tag(self._at + len(spelled))
            else:
                bracket = self._at if form == "object" else self._text.index("(", self._at)
                yield from self._read_call(bracket, alone=form == "bare")

    def _read_call(self, bracket: int, alone: bool) -> Reading[None]:
        """`{...}` or `f(...)`, which stands alone on its line or does not count."""
        end = yield from self._closing(bracket)
        if end is None:
            return self._settle_text(max(self._at + 1, self._skip))
        call = read_spelled(self._text[self._at : end], self._known)
        if call and alone:
            after = yield from self._blanks(end, " \t")
            if (yield from self._character(after)) not in ("", *"\r\n;,`<"):
                call = None
        if call is None:
            self._settle_text(end)
        else:
            self._settle(end, Found(self._text[self._at : end], call))

    def _read_tag(self, opened: int) -> Reading[None]:
        """`<function=f>{...}</function>`; the object or the end may be missing, not both."""
        begin = yield from self._blanks(opened)
        end: int | None = None
        if (yield from self._character(begin)) == "{":
            end = yield from self._closing(begin)
        elif (yield from self._is("</function>", begin)):
            end = opened
        call = read_spelled(self._text[self._at : end], self._known) if end is not None else None
        if end is None or call is None:
            return self._settle_text(max(opened, self._skip) if end is None else end)
        self._settle(end, Found(self._text[self._at : end], call))
        end = yield from self._blanks(self._at)
        if (yield from self._is("</function>", end)):
            end += len("</function>")
            self._settle(end, Found(self._text[self._at : end]))

    def _read_list(self) -> Reading[None]:
        """`[f(a=1), g()]` or `[{...}, {...}]`. A call in it is certain when another follows or the list is closed;
        those that are certain stay calls whatever comes behind them."""
        start = done = self._at
        others: list[str] = []
        call: ToolCall | None = None
        at = start + 1
        while True:
            at = yield from self._blanks(at)
            bracket = yield from self._member(at)
            if bracket is None:
                break
            if call is not None:
                self._pieces.append(Found(self._text[done:at], call))
                call, done = None, at
            end = yield from self._closing(bracket)
            if end is None:
                break
            call = read_spelled(self._text[at:end], self._known)
            if call is None:
                others.append(self._text[at:end])
            at = yield from self._blanks(end)
            if (yield from self._character(at)) != ",":
                break
            at += 1

        character = yield from self._character(at)
        closed = character == "]"
        ended = not character or (character == "<" and (yield from self._is("<|python_", at)))
        if done == start and (call is None or not (closed or ended)):
            return self._settle_text(at + 1 if closed else max(at, self._skip))
        left = "[" + ", ".join(others) + "]" if others else ""
        if not closed:  # what follows is text, as if it stood in a list
            left = left.removesuffix("]") if ended else "[" + "".join(f"{other}, " for other in others)
        end = at + 1 if closed else at
        self._settle(end, Found(self._text[done:end], call, left))

    def _member(self, at: int) -> Reading[int | None]:
        """Where the bracket of a call in a list stands, if one begins here."""
        while True:
            if member := self._beginnings.member.match(self._text, at):
                return member.end()
            if self._ended or not self._beginnings.member_begun.fullmatch(self._text, at):
                return None
            yield

    def _closing(self, at: int) -> Reading[int | None]:
        """The end of the bracketed expression that begins here; None if brackets or quotes do not match."""
        self._skip, self._limit = 0, at + LONGEST
        expected: list[str] = []
        while True:
            found = _BRACKET_OR_QUOTE.search(self._text, at)
            at = found.end() if found else len(self._text)
            if found and found[0] in "'\"":
                end = yield from self._end_of_string(found.start(), found[0])
                at = len(self._text) if end is None else end
                if end is None and self._ended:
                    return None
            if at > self._limit:
                self._skip = self._limit
                return None
            if found is None:
                if self._ended:
                    return None
                yield
            elif found[0] in _CLOSING:
                expected.append(_CLOSING[found[0]])
                if len(expected) > DEEPEST:
                    self._skip = at
                    return None
            elif found[0] in ")]}":
                if found[0] != expected.pop():
                    return None
                if not expected:
                    return at

    def _end_of_string(self, at: int, quote: str) -> Reading[int | None]:
        """The end of the string whose quote stands here; None if the text ends, or becomes too long, before."""
        if (yield from self._is(quote * 3, at)):
            quote *= 3
        at += len(quote)
        while True:
            found = _END_OF_STRING[quote].search(self._text, at)
            if found and found[0] == quote:
                return found.end()
            if found:
                at = found.end() + 1  # what is escaped
            elif self._ended or len(self._text) > self._limit:
                return None
            else:
                at = max(at, len(self._text) - len(quote) + 1)
                yield

    def _blanks(self, at: int, kinds: str = "") -> Reading[int]:
        """Past blanks, or those of these kinds."""
        while True:
            while at < len(self._text) and (self._text[at] in kinds if kinds else self._text[at].isspace()):
                at += 1
            if at < len(self._text) or self._ended:
                return at
            yield

    def _character(self, at: int) -> Reading[str]:
        """The character here; "" if the text has ended."""
        while at >= len(self._text) and not self._ended:
            yield
        return self._text[at : at + 1]

    def _is(self, word: str, at: int) -> Reading[bool]:
        """Whether `word` stands here."""
        while len(self._text) - at < len(word) and word.startswith(self._text[at:]) and not self._ended:
            yield
        return self._text.startswith(word, at)

    def _settle_text(self, end: int) -> None:
        """What is open up to `end` is text."""
        if end > self._at:
            self._pieces.append(self._text[self._at : end])
            self._text = self._text[end - 1 :]
            self._at = 1

    def _settle(self, end: int, piece: Found | Mark) -> None:
        """What is open up to `end` is no text. What follows is at the beginning of a line, as it were."""
        self._pieces.append(piece)
        self._text = "\n" + self._text[end:]
        self._at = 1
