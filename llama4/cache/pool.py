"""Memory for the blocks of caches, within a limit.

Blocks are counted by reference: a block is a tensor that several rows and the prefix index may name, and Python's own
count of references is the count. When the last of them lets it go, its bytes are free.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class BlockPool:
    """Where caches take their blocks from.

    Attributes:
        limit: bytes of all blocks together; None for as many as there are.
        used: bytes of the blocks that somebody holds.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0

    @property
    def free(self) -> float:
        """Bytes that may still be taken."""
        return float("inf") if self.limit is None else self.limit - self.used

    def take(self, size: int, device: torch.device, pinned: bool = False) -> Tensor:
        """A block of so many bytes. Who takes sees first that there is room."""
        block = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.count(block)
        return block

    def count(self, block: Tensor) -> None:
        """Count a block that was made elsewhere."""
        size = block.nbytes
        assert size <= self.free, "a block was taken that nobody made room for"
        self.used += size
        weakref.finalize(block, self._give_back, size).atexit = False

    def _give_back(self, size: int) -> None:
        self.used -= size
