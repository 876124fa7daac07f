"""The keys and values of one layer, in blocks.

Memory is taken in blocks of 256 slots: growing copies nothing, and rows that begin alike share the blocks of what they
have in common.

Shapes: B rows, K key/value heads, S slots, C head_dim, N new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llama4.cache.formats import CacheFormat
from llama4.cache.pool import BlockPool
from llama4.config import CACHE_BLOCK, TextConfig
from llama4.config.window import SlidingWindow, slot_of
from llama4.ops.attention import write_run
from llama4.ops.memory import to_device

READ_SLOTS = 16 * CACHE_BLOCK
"""Slots that are concatenated, and dequantized, at once where attention reads keys and values as one tensor."""
GPU_READ_BYTES = 128 << 20
"""The same for a GPU, as bytes of the tensors: 32,768 slots of Scout. Merging what attention gives for each part then
takes little of the time."""


class LayerCache:
    """Keys and values of one layer. A block is a tensor of bytes: first the values of keys and values in the layer's
    format, [2, K, BLOCK, ...], then, if the format is scaled, their scales, [2, K, BLOCK].

    Keys of a row are in slots that count from the first token that the row's last token sees: of its chunk, or of its
    sequence. Only full blocks are shared by rows, and those are never written to.

    Only this folder writes: `rows`, `write`, `reserve`, `restore` and what else changes a layer are for `SequenceCache`
    and `LayerView`, which keep the count of tokens right. Others read.

    Attributes:
        rows: the blocks of each row.
    """

    def __init__(
        self,
        batch_size: int,
        config: TextConfig,
        format: CacheFormat,
        device: torch.device,
        pool: BlockPool | None = None,
        pinned: bool = False,
    ) -> None:
        self.format = format
        self.pinned = pinned
        self.pool = pool or BlockPool()
        self.heads = config.num_key_value_heads
        self.device = device
        self.rows: list[list[Tensor]] = [[] for _ in range(batch_size)]
        self._shape = (2, self.heads, CACHE_BLOCK)
        self._head_dim = config.head_dim
        self._bytes = format.bytes(config.head_dim)
        self._block_table: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_block_table": None}  # a copy has blocks of its own, at other addresses

    def parts(self, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """A block as values [2, K, BLOCK, ...] and scales [2, K, BLOCK]."""
        size = 2 * self.heads * CACHE_BLOCK * self._bytes
        values = self.format.view(block[:size].view(*self._shape, self._bytes))
        return values, block[size:].view(torch.bfloat16).view(self._shape) if self.format.scaled else None

    @staticmethod
    def num_blocks(slots: int) -> int:
        """Blocks that so many slots take."""
        return -(-slots // CACHE_BLOCK)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return 2 * self.heads * CACHE_BLOCK * (self._bytes + (2 if self.format.scaled else 0))

    def used_blocks(self, row: int, slots: int) -> Iterator[Tensor]:
        """The blocks of the first `slots` slots of a row; of the last a copy with zeros behind them."""
        for j, block in enumerate(self.rows[row][: self.num_blocks(slots)]):
            used = slots - j * CACHE_BLOCK
            if used < CACHE_BLOCK:
                block = block.clone()
                for part in self.parts(block):
                    if part is not None:
                        part[:, :, used:].zero_()
            yield block

    def restore(self, row: int, blocks: Sequence[Tensor]) -> None:
        """Replace the blocks of a row by copies of these."""
        self.reserve(row, 0, 0)
        self.reserve(row, 0, len(blocks) * CACHE_BLOCK)
        for own, given in zip(self.rows[row], blocks, strict=True):
            own.copy_(given)

    def reserve(self, row: int, past: int, new: int) -> None:
        """Keep the first `past` slots of a row, free the blocks behind them, and take blocks for `new` more slots."""
        blocks = self.rows[row]
        kept, wanted = self.num_blocks(past), self.num_blocks(past + new)
        if kept < len(blocks) or wanted > len(blocks):
            self._block_table = None
        del blocks[kept:]
        while len(blocks) < wanted:
            blocks.append(self.pool.take(self.block_bytes, self.device, self.pinned))

    def write(self, row: int, past: int, keys_NKC: Tensor, values_NKC: Tensor) -> None:
        """Write new tokens behind the first `past` slots of a row; what was there is lost."""
        self.reserve(row, past, len(keys_NKC))
        write_run(keys_NKC, values_NKC, self, row, past)

    def write_ring(self, row: int, before: int, window: SlidingWindow, keys_NKC: Tensor, values_NKC: Tensor) -> None:
        """Write new tokens, behind the first `before` of the row's sequence, into a ring of `window` slots, where they
        take the places of the oldest."""
        before, new = before + max(0, len(keys_NKC) - window), len(keys_NKC[-window:])
        self.reserve_ring(row, before, new, window)
        begin = len(keys_NKC) - new
        for slot, count in _runs_in_ring(before, new, window):
            write_run(keys_NKC[begin : begin + count], values_NKC[begin : begin + count], self, row, slot)
            begin += count

    def reserve_ring(self, row: int, before: int, new: int, window: SlidingWindow) -> None:
        """Take blocks for at most `window` new tokens behind the first `before` of the row's sequence, in a ring. Those
        that they go to are this row's own from then on."""
        cached_tokens = min(before, window)
        self.reserve(row, cached_tokens, min(cached_tokens + new, window) - cached_tokens)
        for slot, _ in _runs_in_ring(before, new, window):
            if slot % CACHE_BLOCK == 0:
                self.detach(row, slot)

    def detach(self, row: int, slot: int) -> None:
        """Make the block of a slot, if there is one, this row's own: it will be written to, and may be shared."""
        if slot // CACHE_BLOCK < len(blocks := self.rows[row]):
            blocks[slot // CACHE_BLOCK] = block = blocks[slot // CACHE_BLOCK].clone()
            self.pool.count(block)
            self._block_table = None

    def fill(self, row: int, begin: int, keys_NKC: Tensor, values_NKC: Tensor) -> None:
        """Write to slots from `begin` on, whose blocks are there and the row's own."""
        first, end = begin, begin + len(keys_NKC)
        new = self.format.encode(torch.stack((keys_NKC.detach(), values_NKC.detach())).transpose(1, 2))
        while begin < end:
            slot, stop = begin % CACHE_BLOCK, min(end, begin - begin % CACHE_BLOCK + CACHE_BLOCK)
            for stored, given in zip(self.parts(self.rows[row][begin // CACHE_BLOCK]), new, strict=True):
                if stored is not None and given is not None:
                    stored[:, :, slot : slot + stop - begin] = given[:, :, begin - first : stop - first]
            begin = stop

    def read(self, row: int, slots: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `slots` slots of a row, some thousands at a time: keys and values, each [K, S, C]."""
        at_once = READ_SLOTS
        if device.type == "cuda":
            size = 8 if self.format.scaled else dtype.itemsize  # of float32 numbers, and of these times their scales
            at_once = GPU_READ_BYTES // (2 * self.heads * self._head_dim * size * CACHE_BLOCK) * CACHE_BLOCK
            at_once = max(at_once, READ_SLOTS)
        for begin in range(0, slots, at_once):
            end = min(slots, begin + at_once)
            blocks = self.rows[row][begin // CACHE_BLOCK : self.num_blocks(end)]
            parts = [self.parts(block.to(device, non_blocking=self.pinned)) for block in blocks]
            stored = torch.cat([values for values, _ in parts], dim=2)[:, :, : end - begin]
            scales = torch.cat([s for _, s in parts if s is not None], dim=2) if self.format.scaled else None
            scales = scales[:, :, : end - begin] if scales is not None else None
            keys, values = self.format.decode(stored, scales, dtype)
            yield keys, values

    def block_table(self) -> Tensor:
        """Addresses of the blocks of every row, [B, blocks], zeros behind the last; on the device of the blocks."""
        if self._block_table is None:
            width = max(map(len, self.rows))
            addresses = [[b.data_ptr() for b in blocks] + [0] * (width - len(blocks)) for blocks in self.rows]
            self._block_table = to_device(addresses, self.device)
        return self._block_table

    def block_addresses(self, row: int) -> Tensor:
        """Addresses of the blocks of one row."""
        return torch.tensor([block.data_ptr() for block in self.rows[row]], dtype=torch.long)

    def truncate(self, row: int, slots: int) -> None:
        """Forget all but the first `slots` slots of a row."""
        blocks = self.rows[row]
        del blocks[self.num_blocks(slots) :]
        if slots % CACHE_BLOCK:
            blocks[-1] = blocks[-1].clone()  # it may have been full, and shared
            self.pool.count(blocks[-1])
        self._block_table = None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        self.rows = [self.rows[row] for row in rows]
        self._block_table = None

    def fork(self, rows: Sequence[int], slots: Sequence[int]) -> LayerCache:
        """Another cache, of the first `slots` slots of each of these rows; a row may be named more than once."""
        other = copy.copy(self)
        other.rows = [list(self.rows[row]) for row in rows]
        for row, count in enumerate(slots):
            other.truncate(row, count)
        return other

    @staticmethod
    def join(layers: Sequence[LayerCache]) -> LayerCache:
        """One layer of the rows of several, which hand their blocks over."""
        joined = copy.copy(layers[0])
        joined.rows = [row for layer in layers for row in layer.rows]
        joined._block_table = None
        return joined


def _runs_in_ring(before: int, new: int, window: SlidingWindow) -> Iterator[tuple[int, int]]:
    """Where new tokens go in a ring, cut where blocks end, and the ring: the first slot of each run, and how many."""
    while new:
        slot = slot_of(before, window)
        count = min(new, CACHE_BLOCK - slot % CACHE_BLOCK, window - slot)
        yield slot, count
        before, new = before + count, new - count
