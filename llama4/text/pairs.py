"""Byte-pair encoding by a list of merges or by scores: of neighbouring symbols, those are merged first that come first.

Of symbols that come alike, the leftmost are. O(n log n) in the length of a text.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


def merge_pairs(
    symbols: list[str],
    priority: Callable[[str, str], float | None],
    splits: dict[str, tuple[str, str]] | None = None,
) -> list[str]:
    """Symbols, merged as far as they can be.

    Args:
        priority: of two symbols, when they are merged, the lowest first; None if they are not.
        splits: filled with what each merged symbol could be made of.
    """
    symbols = symbols.copy()
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    queue: list[tuple[float, int, int, str]] = []

    def look(left: int, right: int) -> None:
        if left < 0 or right < 0:
            return
        order = priority(symbols[left], symbols[right])
        if order is not None:
            whole = symbols[left] + symbols[right]
            heapq.heappush(queue, (order, left, right, whole))
            if splits is not None:
                splits[whole] = symbols[left], symbols[right]

    for i in range(1, len(symbols)):
        look(i - 1, i)
    while queue:
        _, left, right, whole = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != whole:
            continue
        symbols[left], symbols[right] = whole, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        look(before[left], left)
        look(left, after[left])
    return [symbol for symbol in symbols if symbol]
