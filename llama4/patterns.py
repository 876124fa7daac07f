"""Regular expressions that files bring along: each may be hostile."""

from __future__ import annotations

import re
import time

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
