"""The requests that decode, and their caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llama4.cache.sequence import SequenceCache
from llama4.engine.request import Request


@dataclass
class Group:
    """Requests that decode in one forward, and their cache, a row of each.

    Attributes:
        requests: those of an adapter stand together, the oldest first.
    """

    requests: list[Request] = field(default_factory=list)
    cache: SequenceCache | None = None

    @property
    def own_cache(self) -> SequenceCache:
        assert self.cache is not None, "nobody is in it"
        return self.cache

    def join(self, request: Request) -> None:
        joined = request.own_cache if self.cache is None else SequenceCache.join([self.cache, request.own_cache])
        requests = [*self.requests, request]
        request.cache = None
        order = sorted(range(len(requests)), key=lambda row: (requests[row].adapter, requests[row].arrival))
        if order != list(range(len(requests))):
            joined.select_rows(order)
        self.requests, self.cache = [requests[row] for row in order], joined

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all requests but these."""
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        if not rows:
            self.cache = None
        elif self.cache is not None:
            self.cache.select_rows(rows)


class Running:
    """Groups of requests by what those that share a forward have in common."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], Group] = {}

    @property
    def groups(self) -> list[Group]:
        """Those that have requests."""
        return [group for group in list(self._groups.values()) if group.requests]  # a copy: other threads read, too

    @property
    def requests(self) -> list[Request]:
        return [request for group in self.groups for request in group.requests]

    def join(self, request: Request) -> None:
        self._groups.setdefault(request.adapter.modules, Group()).join(request)

    def remove(self, request: Request) -> None:
        group = self._groups[request.adapter.modules]
        group.keep([row for row, each in enumerate(group.requests) if each is not request])
