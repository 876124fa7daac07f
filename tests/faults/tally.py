"""How often each kind was tried, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest


class Tally:
    """Counts, in the order in which kinds come.

    Attributes:
        tried: kind -> how often.
        failed: kind -> how often.
    """

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def note(self, kind: str, problem: str | None, case: str = "") -> None:
        """One try; `problem` is what is wrong, which is printed, or None."""
        self.tried[kind] += 1
        if problem is not None:
            self.failed[kind] += 1
            print(f"{kind}{', ' if case else ''}{case}: {problem}", flush=True)

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        """Of parts that took the kinds in turn."""
        whole, parts = cls(), list(parts)
        for kinds in zip_longest(*(part.tried for part in parts)):
            for part, kind in zip(parts, kinds, strict=True):
                if kind is not None:
                    whole.tried[kind], whole.failed[kind] = part.tried[kind], part.failed[kind]
        return whole

    def __str__(self) -> str:
        counts = [(kind, self.tried[kind], self.failed[kind]) for kind in self.tried]
        counts.append(("in all", self.tried.total(), self.failed.total()))
        return "\n".join(f"{kind:24}{tried:>8} tried{failed:>6} failed" for kind, tried, failed in counts)
