"""What a template may make: a budget of work and time for each rendering.

A thread cannot be stopped from outside, so nothing large may begin: whatever a template makes is charged, and what may
grow in one operation (`GROWTH`) is charged before it happens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TypeVar

MAX_SECONDS = 10.0
MAX_WORK = 1 << 22
"""What a template may make beyond 1000 times what it is given: characters, and `ITEM` for an item or a step."""
MAX_INTEGER_BITS = 4096
ITEM = 16

T = TypeVar("T")


class LimitError(Exception):
    """A limit that a template reaches."""


class Budget:
    """What is left of the work and time of one rendering."""

    def __init__(self, given: object) -> None:
        self.left = MAX_WORK + 1000 * size_of(given, 1 << 40)
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, work: int) -> None:
        self.left -= work + ITEM
        if self.left < 0:
            raise LimitError("it makes too much text or too many items")
        if time.monotonic() > self.deadline:
            raise LimitError(f"it is not done after {MAX_SECONDS:g} seconds")

    def charge(self, value: T) -> T:
        """Pay for a value that the template made."""
        self.spend(size_of(value, self.left))
        return value


BUDGET: ContextVar[Budget] = ContextVar("budget")


def size_of(value: object, limit: int) -> int:
    """Characters and items in a value, one that is in several places as often; at least `limit` if it is more."""
    total, stack = 0, [value]
    while stack and total + len(stack) * ITEM <= limit:
        each = stack.pop()
        total += ITEM
        if isinstance(each, (str, bytes)):
            total += len(each)
        elif isinstance(each, int):
            if each.bit_length() > MAX_INTEGER_BITS:
                raise LimitError("it computes with numbers that are too large")
        elif isinstance(each, Mapping):
            stack.extend(each.keys())
            stack.extend(each.values())
        elif isinstance(each, (list, tuple, set, frozenset)):
            stack.extend(each)
        elif isinstance(each, range):
            total += len(each) * ITEM
    return total + len(stack) * ITEM


def _replaced(text: object, old: object, new: object, *_: object, **__: object) -> int:
    return str(text).count(str(old)) * len(str(new))


def _padded(value: object, *amounts: object, **more: object) -> int:
    lines = str(value).count("\n") + 1 if isinstance(value, str) else 1
    given = (*amounts, *more.values())
    return lines * ITEM * sum(len(x) if isinstance(x, str) else abs(x) if isinstance(x, int) else 0 for x in given)


def _precise(value: object, precision: int = 0, *_: object, **__: object) -> int:
    if abs(precision) > 100:
        raise LimitError("it rounds to more than 100 digits")
    return 0


def _pieces(value: object, *_: object, **__: object) -> int:
    return len(value) * ITEM if isinstance(value, str) else 0


GROWTH: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "center": _padded,
    "indent": _padded,
    "batch": _padded,
    "slice": _padded,
    "round": _precise,
    "format": lambda text, *args, **kwargs: formatted_size(str(text), (args, kwargs)),
    "list": _pieces,
    "split": _pieces,
    "rsplit": _pieces,
    "splitlines": _pieces,
}
"""Filter or method -> what it makes at most, beyond what it is given."""
_PERCENT_WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")


def formatted_size(text: str, values: object) -> int:
    """What `text % values` makes at most."""
    if _PERCENT_WIDTH.search(text):
        raise LimitError("it pads a number or a text too far")
    budget = BUDGET.get()
    return (text.count("%") + 1) * size_of(values, budget.left)
