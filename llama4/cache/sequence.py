"""The key/value cache: a chunked layer never holds more than one chunk, a NoPE layer every token.

Keys of a row live in slots that count from the beginning of what a token can see: of its chunk, or of its sequence. At
a chunk border counting starts anew and the old chunk is let go, so attention reads slots [0, past + new) and needs no
mask. Memory is taken in blocks of 256 slots: growing copies nothing, and rows that begin alike share the blocks of what
they have in common.

Shapes: B rows, K key/value heads, S slots, C head_dim, n new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llama4.cache.formats import Format, Unquantized
from llama4.config import CACHE_BLOCK, TextConfig
from llama4.model.batch import Batch, Step

SPAN = 16 * CACHE_BLOCK
"""Tokens that are put together, and decoded, at once where attention wants them in one piece."""


class LayerCache:
    """Keys and values of one layer, in blocks: tensors of bytes, first the codes of keys and values, [2, K, BLOCK,
    ...], then, if the format has any, their scales, [2, K, BLOCK].

    Only full blocks are shared by rows, and those are never written to.
    """

    def __init__(
        self, batch_size: int, config: TextConfig, format: Format, device: torch.device, pinned: bool = False
    ) -> None:
        self.format = format
        self.pinned = pinned
        self.heads = config.num_key_value_heads
        self.device = device
        self.rows: list[list[Tensor]] = [[] for _ in range(batch_size)]
        self._shape = (2, self.heads, CACHE_BLOCK)
        self._bytes = format.bytes(config.head_dim)
        self._table: Tensor | None = None

    def parts(self, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes [2, K, BLOCK, ...] and scales [2, K, BLOCK] of a block."""
        heads = 2 * self.heads * CACHE_BLOCK
        codes = self.format.view(block[: heads * self._bytes].view(*self._shape, self._bytes))
        return codes, block[heads * self._bytes :].view(torch.bfloat16).view(
            self._shape
        ) if self.format.scaled else None

    @staticmethod
    def blocks_for(slots: int) -> int:
        return -(-slots // CACHE_BLOCK)

    def _reserve(self, row: int, slots: int) -> None:
        """Make room for `slots` tokens of a row."""
        blocks = self.rows[row]
        while len(blocks) * CACHE_BLOCK < slots:
            heads = 2 * self.heads * CACHE_BLOCK
            size = heads * (self._bytes + (2 if self.format.scaled else 0))
            blocks.append(torch.empty(size, dtype=torch.uint8, device=self.device, pin_memory=self.pinned))
            self._table = None

    def keep(self, row: int, past: int, keys_nKC: Tensor, values_nKC: Tensor) -> None:
        """Write new tokens behind the first `past` of a row; what else was there is let go."""
        if len(self.rows[row]) > self.blocks_for(past):
            del self.rows[row][self.blocks_for(past) :]
            self._table = None
        end = past + len(keys_nKC)
        self._reserve(row, end)
        new = self.format.encode(torch.stack((keys_nKC.detach(), values_nKC.detach())).transpose(1, 2))
        begin = past
        while begin < end:
            slot, stop = begin % CACHE_BLOCK, min(end, begin - begin % CACHE_BLOCK + CACHE_BLOCK)
            for held, given in zip(self.parts(self.rows[row][begin // CACHE_BLOCK]), new, strict=True):
                if held is not None and given is not None:
                    held[:, :, slot : slot + stop - begin] = given[:, :, begin - past : stop - past]
            begin = stop

    def spans(self, row: int, slots: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `slots` tokens of a row, some thousands at a time: keys and values, each [K, S, C]."""
        for begin in range(0, slots, SPAN):
            end = min(slots, begin + SPAN)
            held = self.rows[row][begin // CACHE_BLOCK : self.blocks_for(end)]
            blocks = [self.parts(block.to(device, non_blocking=self.pinned)) for block in held]
            codes = torch.cat([codes for codes, _ in blocks], dim=2)[:, :, : end - begin]
            scales = torch.cat([s for _, s in blocks if s is not None], dim=2) if self.format.scaled else None
            scales = scales[:, :, : end - begin] if scales is not None else None
            keys, values = self.format.decode(codes, scales, dtype)
            yield keys, values

    def make_room(self, step: Step) -> None:
        """For the one new token of every row."""
        for row, slot in enumerate(step.slots):
            if slot == 0 and self.rows[row]:
                self.rows[row].clear()
                self._table = None
            self._reserve(row, slot + 1)

    def table(self) -> Tensor:
        """Addresses of the blocks of every row, [B, blocks], zeros behind the last."""
        if self._table is None:
            width = max(map(len, self.rows))
            addresses = [[b.data_ptr() for b in blocks] + [0] * (width - len(blocks)) for blocks in self.rows]
            self._table = torch.tensor(addresses, dtype=torch.long)
        return self._table

    def addresses(self, row: int) -> Tensor:
        """Of the blocks of one row."""
        return torch.tensor([block.data_ptr() for block in self.rows[row]], dtype=torch.long)

    def cut(self, row: int, slots: int) -> None:
        """Let go of all but the first `slots` tokens of a row."""
        blocks = self.rows[row]
        del blocks[self.blocks_for(slots) :]
        if slots % CACHE_BLOCK:
            blocks[-1] = blocks[-1].clone()  # it may have been full, and shared
        self._table = None

    def fork(self, rows: Sequence[int], slots: Sequence[int]) -> LayerCache:
        """Another cache, of these rows, perhaps some more than once, of which `slots` tokens each are wanted."""
        other = copy.copy(self)
        other.rows = [list(self.rows[row]) for row in rows]
        for row, count in enumerate(slots):
            other.cut(row, count)
        return other


class Cache:
    """What the decoder remembers of B sequences.

    Attributes:
        firsts: position of the first token of each row.
        nexts: position that the next token of each row will have.
        version: a number that grows with every change.
        layers: one `LayerCache` per decoder layer.
        is_consistent: false while a forward is adding tokens, and for good if that was broken off.
        answer: where a prompt of the only row ended and the logits there, for the same prompt to get the same reply.
    """

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        format: Format | None = None,
        full_device: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"a cache needs at least one row, not batch_size={batch_size}")
        self.firsts: tuple[int, ...] = (0,) * batch_size
        self.nexts: tuple[int, ...] = (0,) * batch_size
        self.version = 0
        self.is_consistent = True
        self.answer: tuple[int, Tensor] | None = None
        self.windows = [config.window(i) for i in range(config.num_hidden_layers)]
        full_device = full_device or device
        pinned = full_device.type == "cpu" and device.type == "cuda"  # a GPU reads that without the host's help
        self.layers = [
            LayerCache(batch_size, config, format or Unquantized(dtype), full_device, pinned)
            if window is None
            else LayerCache(batch_size, config, Unquantized(dtype), device)
            for window in self.windows
        ]

    @property
    def batch_size(self) -> int:
        return len(self.nexts)

    @property
    def lengths(self) -> list[int]:
        """Tokens seen so far, per row."""
        return [end - begin for begin, end in zip(self.firsts, self.nexts, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes that the keys and values occupy now, what rows share counted once."""
        blocks = {id(b): b.numel() for layer in self.layers for blocks in layer.rows for b in blocks}
        return sum(blocks.values())

    def advance(self, batch: Batch) -> None:
        """Count the new tokens, once all layers have them."""
        self.firsts = tuple(batch.firsts)
        self.nexts = tuple(start + length for start, length in zip(batch.starts, batch.lengths, strict=True))
        self.version += 1
        self.is_consistent = True

    def count_step(self) -> int:
        """Count one new token in every row, which a runner has written; -> the version that the cache has now."""
        self.nexts = tuple([position + 1 for position in self.nexts])
        self.version += 1
        return self.version

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        self.firsts, self.nexts = (tuple(values[row] for row in rows) for values in (self.firsts, self.nexts))
        for layer in self.layers:
            layer.rows = [layer.rows[row] for row in rows]
            layer._table = None
        self.version += 1

    def fork(self, rows: Sequence[int] | None = None) -> Cache:
        """A cache that begins with what this one holds, or some rows of it, and goes its own way from there. Full
        blocks are shared, so this takes neither time nor memory."""
        rows = range(self.batch_size) if rows is None else rows
        other = copy.copy(self)
        other.firsts, other.nexts = (tuple(values[row] for row in rows) for values in (self.firsts, self.nexts))
        other.layers = [
            layer.fork(rows, [self.held(row, self.nexts[row], window) for row in rows])
            for layer, window in zip(self.layers, self.windows, strict=True)
        ]
        return other

    def truncate(self, length: int) -> int:
        """Forget all but the first `length` tokens of the only row.

        Returns:
            How many are left: fewer than asked for where chunked layers have let go of the chunk in which that is.
        """
        assert self.batch_size == 1
        first, next_ = self.firsts[0], self.nexts[0]
        position = min(first + length, next_)
        for chunk in {window for window in self.windows if window is not None}:
            if position % chunk and position // chunk < (next_ - 1) // chunk:
                position = max(first, position // chunk * chunk)
        for layer, window in zip(self.layers, self.windows, strict=True):
            layer.cut(0, 0 if window and position % window == 0 else self.held(0, position, window))
        self.nexts = (position,)
        self.version += 1
        return position - first

    def held(self, row: int, end: int, window: int | None) -> int:
        """Slots of a row that a layer uses when its next token is at position `end`."""
        begin = self.firsts[row]
        return end - (begin if window is None else max(begin, (end - 1) // window * window)) if end > begin else 0
