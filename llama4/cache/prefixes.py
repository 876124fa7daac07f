"""Full blocks of keys and values by the tokens that they were computed from, for prompts that begin alike."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from llama4.cache.sequence import SequenceCache
from llama4.config import CACHE_BLOCK


@dataclass
class _Entry:
    """One block of every layer.

    Attributes:
        parent: key of the block before.
        children: how many blocks in the index come right after it.
    """

    parent: bytes
    layers: list[Tensor]
    children: int = 0


class PrefixIndex:
    """Blocks that can be shared, each under a hash of its tokens and of all before them.

    Keys are made by `next_key`. A token is an integer that says what it stands for (`engine.prefix_cache.identities`):
    pictures are told apart by their pixels. The block used least recently is given up first, and never before those
    that come after it.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def find(self, keys: Sequence[bytes]) -> list[list[Tensor]]:
        """As many blocks as there are of a run, from the first on: of each that of every layer."""
        found = [entry.layers for entry in takewhile(bool, map(self._entries.get, keys)) if entry]
        for key in reversed(keys[: len(found)]):
            self._entries.move_to_end(key)  # a block is at least as recent as those after it
        return found

    def add(self, parent: bytes, key: bytes, layers: list[Tensor]) -> None:
        """Enter a block, if it is not there, after `parent`, which is empty for the first. If that is not there any
        more, the block could not be found, and is not entered."""
        if key in self._entries or (parent and parent not in self._entries):
            return
        self._entries[key] = _Entry(parent, layers)
        if parent:
            self._entries[parent].children += 1

    def evict(self) -> bool:
        """Give up the block used least recently, of those that none comes after; False if there is none."""
        for key, entry in self._entries.items():
            if not entry.children:
                del self._entries[key]
                if entry.parent:
                    self._entries[entry.parent].children -= 1
                return True
        return False


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block of tokens: a hash of them and of all before."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def is_shareable(cache: SequenceCache) -> bool:
    """Whether a chunk of every layer is a whole number of blocks: else positions do not fill the same blocks
    everywhere. What layers of cross-attention see is in no block."""
    return not cache.cross_layers and all(window is None or window % CACHE_BLOCK == 0 for window in cache.windows)
