"""Prompts that begin alike are read once: full blocks of each are entered in a `PrefixIndex`, and others begin behind
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama4.cache.prefixes import PrefixIndex
from llama4.cache.sequence import SequenceCache
from llama4.config import CACHE_BLOCK
from llama4.engine.request import Request


class SharedBlocks:
    """Prefix sharing between requests.

    Args:
        new_cache: makes an empty cache of one row.
        are_shared: whether they do.

    Attributes:
        index: the blocks that are there.
    """

    def __init__(self, new_cache: Callable[[], SequenceCache], are_shared: bool) -> None:
        self._new_cache, self._are_shared, self.index = new_cache, are_shared, PrefixIndex()

    def begin(self, request: Request) -> None:
        """Begin to read a prompt, behind what is there of it."""
        blocks = self.index.find([request.key(i) for i in range(self._count(request))])
        request.begin(self._new_cache, blocks)

    def readers(self, requests: Sequence[Request]) -> list[Request]:
        """Of requests in order, those that go on to read: where several would compute the same block, the first does,
        and the others wait to take it."""
        readers, blocks = list[Request](), set[bytes]()
        for request in requests:
            key = self._next_key(request)
            if key is not None and key in self.index:  # another has read it since this one began
                request.reset()
                self.begin(request)
                key = self._next_key(request)
            if key not in blocks:
                readers.append(request)
            if key is not None:
                blocks.add(key)
        return readers

    def enter(self, request: Request, cache: SequenceCache, row: int) -> None:
        """Let others have the blocks of a request that are full now."""
        if not self._are_shared:
            return
        for i in range(request.entered, request.computed // CACHE_BLOCK):
            self.index.add(request.key(i - 1), request.key(i), cache.full_block(row, i))
            request.own_blocks.add(i)
        request.entered = request.computed // CACHE_BLOCK

    def _next_key(self, request: Request) -> bytes | None:
        """Of the block that a request would compute next; None if it takes that of nobody."""
        block = request.computed // CACHE_BLOCK
        return request.key(block) if block < self._count(request) else None

    def _count(self, request: Request) -> int:
        """Number of leading full blocks that may come from the index; the block of the last token is always computed,
        for its logits, and all where an observer is told the hidden states."""
        return (len(request.ids) - 1) // CACHE_BLOCK if self._are_shared and request.observer is None else 0
