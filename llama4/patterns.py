"""Regular expressions: those that files bring along, each of which may be hostile, and that of many names."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from os.path import commonprefix

import regex

_MAX_CHARACTERS = 1 << 14
"""The longest in use have 500."""
_CALL = re.compile(r"(?<!\\)(?:\\\\)*\(\?(?:R|&|P(?![<=])|\d)")
"""What calls a pattern, or a part of it, inside itself, which takes memory without end; nobody's has it. In `\\(?R` the
bracket is a character."""


class Patience:
    """What patterns may take together, for one thing that they are for.

    Args:
        seconds: of the clock, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, as `timeout` of one match. The package `regex` counts those of the processors, in all threads: it
        stops a match no later than that.

        Raises:
            TimeoutError: none.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """A regular expression. Give `timeout` where it is used, for it may go back and forth without end.

    Raises:
        ValueError: it is none, or too long, or calls itself.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise ValueError(f"{pattern!r:.80} has {len(pattern)} characters; write a pattern of {_MAX_CHARACTERS} at most")
    if call := _CALL.search(pattern):
        raise ValueError(f"{pattern!r:.80} calls itself by {call[0]!r}; write out what is to be repeated")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{pattern!r:.80} is no regular expression: {error}") from None


_MAX_GROUPS = 50
"""Groups inside one another: `re` reads them by calling itself."""


def longest_of(texts: Iterable[str], groups: int = 0) -> str:
    """A pattern, for `re`, of the longest of some texts that begins at a place. What several begin with stands in it
    once, so that a place is not compared with thousands of them."""
    texts = sorted(texts, key=len, reverse=True)
    start = commonprefix(texts)  # noqa: RUF071, these are no paths
    branches: dict[str, list[str]] = {}
    for rest in (text[len(start) :] for text in texts if text != start):
        branches.setdefault(rest[0], []).append(rest)
    if not branches or groups == _MAX_GROUPS:
        return "|".join(map(re.escape, texts))
    inner = "|".join(longest_of(branch, groups + 1) for branch in branches.values())
    return f"{re.escape(start)}(?:{inner}){'?' * (start in texts)}"
