"""Regular expressions that files bring along: each may be hostile."""

from __future__ import annotations

import re

import regex

_MAX_CHARACTERS = 1 << 14
"""The longest in use have 500."""
_CALL = re.compile(r"\(\?(?:R|&|P[>&]|\d)")
"""What calls a pattern, or a part of it, inside itself, which takes memory without end; nobody's has it."""


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """A regular expression. Give `timeout` where it is used, for it may go back and forth without end.

    Raises:
        ValueError: it is none, or too long, or calls itself.
    """
    if len(pattern) > _MAX_CHARACTERS or _CALL.search(pattern):
        raise ValueError(f"{pattern!r:.80} is longer than {_MAX_CHARACTERS} characters, or calls itself")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{pattern!r:.80} is no regular expression: {error}") from None
