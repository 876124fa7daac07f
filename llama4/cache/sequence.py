"""The key/value cache of a batch of sequences: a chunked layer never holds more than one chunk, a NoPE layer every
token, and one with a sliding window as many as that.

At a chunk border a layer's slots count anew and the old chunk is dropped, so attention reads slots [0, past + new) and
needs no mask.

Shapes: B rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llama4.cache.formats import CacheFormat, Unquantized
from llama4.cache.layer import LayerCache
from llama4.cache.pictures import Picture, before
from llama4.cache.pool import BlockPool
from llama4.config import CACHE_BLOCK, TextConfig
from llama4.config.window import SlidingWindow, chunk_offset, chunk_start, held_tokens, slot_of
from llama4.errors import Llama4Error


class SequenceCache:
    """What the decoder remembers of B sequences.

    Attributes:
        start: position of the first token of each row.
        next_position: position that the next token of each row will have.
        rope_lengths: how long each row was when it began, its whole prompt; 0 if it has not. RoPE's frequencies stay
            those for this length, where they depend on it: keys in the cache are rotated already.
        version: a number that grows with every change.
        is_consistent: false while a forward is adding tokens, and for good if that broke off.
        windows: the window of each layer whose keys come from tokens.
        layers: the keys and values of each of these.
        pictures: of each row those that layers of cross-attention see, in the model's dtype.
        cross_layers: which layers of the decoder these are.
        picture_shape: heads and width of their keys.
        picture_bytes: bytes of one key and value in all of them.
        device, dtype: of the model.
    """

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        format: CacheFormat | None = None,
        full_device: torch.device | None = None,
        pool: BlockPool | None = None,
    ) -> None:
        """An empty cache.

        Args:
            device, dtype: of the keys and values.
            format, full_device: of layers that see every token, where these differ: what `resolve_format` gave, and
                the CPU for a model on a GPU.
            pool: where blocks come from; by default one without a limit.

        Raises:
            Llama4Error: no rows, or a `head_dim` that the format cannot store.
        """
        if batch_size < 1:
            raise Llama4Error(f"a cache needs at least one row, not batch_size={batch_size}")
        self.start: tuple[int, ...] = (0,) * batch_size
        self.next_position: tuple[int, ...] = (0,) * batch_size
        self.rope_lengths: tuple[int, ...] = (0,) * batch_size
        self.version = 0
        self.is_consistent = True
        self._last_logits: tuple[int, Tensor] | None = None
        self.windows = [config.window(i) for i in config.self_layers]
        self.cross_layers = config.cross_layers
        self.pictures: tuple[tuple[Picture, ...], ...] = ((),) * batch_size
        self.device, self.dtype = device, dtype
        self.picture_shape = config.num_key_value_heads, config.head_dim
        self.picture_bytes = 2 * len(self.cross_layers) * math.prod(self.picture_shape) * dtype.itemsize
        full_device = full_device or device
        pinned = full_device.type == "cpu" and device.type == "cuda"  # a GPU reads that without the host's help
        self.pool = pool = pool or BlockPool()
        self.layers = [
            LayerCache(batch_size, config, format or Unquantized(dtype), full_device, pool, pinned)
            if window is None
            else LayerCache(batch_size, config, Unquantized(dtype), device, pool)
            for window in self.windows
        ]
        self._block_bytes: dict[int | None, int] = {}
        for layer, window in zip(self.layers, self.windows, strict=True):
            self._block_bytes[window] = self._block_bytes.get(window, 0) + layer.block_bytes

    @property
    def batch_size(self) -> int:
        return len(self.next_position)

    @property
    def lengths(self) -> list[int]:
        """Tokens seen so far, per row."""
        return [end - begin for begin, end in zip(self.start, self.next_position, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes that the keys and values occupy now, what rows share counted once."""
        blocks = {id(b): b.numel() for layer in self.layers for blocks in layer.rows for b in blocks}
        pictures = {id(picture): picture.num_bytes for row in self.pictures for picture in row}
        return sum(blocks.values()) + sum(pictures.values())

    def cached_tokens(self, row: int, end: int, window: int | None) -> int:
        """Slots of a row that are kept in a layer for its next token, at position `end`; none if it begins a chunk."""
        return held_tokens(end, window, self.start[row])

    def begin_write(self) -> None:
        """Say that keys and values of new tokens are about to be written."""
        self.is_consistent = False
        self.version += 1

    def num_blocks(self, start: int, next_position: int) -> list[int]:
        """Blocks of each layer that hold what a row from `start` to `next_position` keeps."""
        slots = [held_tokens(next_position, window, start) for window in self.windows]
        return [layer.num_blocks(count) for layer, count in zip(self.layers, slots, strict=True)]

    def add_pictures(self, new: Sequence[Sequence[Picture]]) -> None:
        """Keep the new pictures of each row, once all layers have their keys and values."""
        for picture in (each for row in new for each in row):
            for layer in picture.layers:
                self.pool.count(layer)
        self.pictures = tuple((*known, *added) for known, added in zip(self.pictures, new, strict=True))

    def announce(self, lengths: Sequence[int]) -> None:
        """Say how long the prompts of rows that have not begun are, before they come in pieces."""
        self.rope_lengths = tuple(known or length for known, length in zip(self.rope_lengths, lengths, strict=True))

    def restore(
        self,
        start: int,
        next_position: int,
        rope_length: int,
        blocks: Sequence[Sequence[Tensor]],
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Replace what the only row holds by copies of the blocks of another cache. Nothing changes if they do not fit.

        Args:
            start, next_position, rope_length: of the other cache.
            blocks: of each layer, as many as `num_blocks` says, uint8.
            pictures: in order.

        Raises:
            Llama4Error: positions that cannot be; blocks of another number, size or dtype.
        """
        assert self.batch_size == 1
        if not 0 <= start <= next_position:
            raise Llama4Error(f"a sequence cannot begin at position {start} and go on at {next_position}")
        wanted = self.num_blocks(start, next_position)
        if (counts := [len(given) for given in blocks]) != wanted:
            raise Llama4Error(f"its layers have {counts} blocks, but must have {wanted}")
        for i, (layer, given) in enumerate(zip(self.layers, blocks, strict=True)):
            for block in given:
                if block.dtype != torch.uint8 or block.shape != (layer.block_bytes,):
                    raise Llama4Error(
                        f"a block of layer {i} is {list(block.shape)} {block.dtype}, but must be "
                        f"[{layer.block_bytes}] {torch.uint8}"
                    )
        self.begin_write()
        self._last_logits = None
        for layer, given in zip(self.layers, blocks, strict=True):
            layer.restore(0, given)
        self.pictures = ((),)
        self.add_pictures([pictures])
        self.commit((start,), (next_position,), (rope_length,))

    def commit(self, start: tuple[int, ...], next_position: tuple[int, ...], rope_lengths: tuple[int, ...]) -> None:
        """Count new tokens, once all layers have them."""
        self.start, self.next_position, self.rope_lengths = start, next_position, rope_lengths
        self.version += 1
        self.is_consistent = True

    def commit_step(self) -> int:
        """Count one new token in every row; -> the version that the cache has now."""
        self.next_position = tuple([position + 1 for position in self.next_position])
        self.version += 1
        return self.version

    def remember_logits(self, logits_1V: Tensor) -> None:
        """Keep the logits behind the tokens of the only row, for the same prompt to get the same reply. They stay while
        these tokens do: more may be added, and a fork of the row has them too."""
        assert self.batch_size == 1
        self._last_logits = self.lengths[0], logits_1V

    def logits_after(self, length: int) -> Tensor | None:
        """The remembered logits [1, V], if they are those behind the first `length` tokens of the only row."""
        return self._last_logits[1] if self._last_logits is not None and self._last_logits[0] == length else None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        self.start, self.next_position, self.rope_lengths = (
            tuple(values[row] for row in rows) for values in (self.start, self.next_position, self.rope_lengths)
        )
        self.pictures = tuple(self.pictures[row] for row in rows)
        for layer in self.layers:
            layer.select_rows(rows)
        self._last_logits = self._last_logits if len(rows) == 1 else None
        self.version += 1

    def fork(self, rows: Sequence[int] | None = None) -> SequenceCache:
        """A cache that begins with what this one holds, or some rows of it, and goes its own way from there. Full
        blocks are shared; of each row and layer the last block is copied if it is only partly filled."""
        rows = range(self.batch_size) if rows is None else rows
        other = copy.copy(self)
        other.start, other.next_position, other.rope_lengths = (
            tuple(values[row] for row in rows) for values in (self.start, self.next_position, self.rope_lengths)
        )
        other.pictures = tuple(self.pictures[row] for row in rows)
        other.layers = [
            layer.fork(rows, [self.cached_tokens(row, self.next_position[row], window) for row in rows])
            for layer, window in zip(self.layers, self.windows, strict=True)
        ]
        other._last_logits = self._last_logits if len(rows) == 1 else None
        other._detach_rings()
        return other

    def _next_slot(self, row: int, window: int | None) -> int:
        """Where the next token of a row goes in a layer."""
        return slot_of(self.next_position[row], window, self.start[row])

    def _detach_rings(self) -> None:
        """Rings that have come round write to full blocks, which may be shared: each has its own from its first slot on
        (see `LayerCache.write_ring`), and the one in the middle of which they are, here."""
        for layer, window in zip(self.layers, self.windows, strict=True):
            if isinstance(window, SlidingWindow):
                for row, length in enumerate(self.lengths):
                    if length >= window and (slot := self._next_slot(row, window)) % CACHE_BLOCK:
                        layer.detach(row, slot)

    def truncate(self, length: int) -> int:
        """Forget all but the first `length` tokens of the only row.

        Returns:
            How many are left: fewer than asked for where chunked layers have dropped the chunk in which that is.
        """
        assert self.batch_size == 1
        start, next_position = self.start[0], self.next_position[0]
        position = min(start + length, next_position)
        for window in set(self.windows):
            if isinstance(window, SlidingWindow):  # a ring has one token more than the next one sees
                lacks = next_position - start > window and position < next_position - 1
                position = start if lacks else position
                continue
            is_dropped = chunk_start(position, window) < chunk_start(next_position, window)
            if is_dropped and chunk_offset(position, window):
                position = chunk_start(position, window, start)
        for layer, window in zip(self.layers, self.windows, strict=True):
            layer.truncate(0, self.cached_tokens(0, position, window))
        self.next_position = (position,)
        self.pictures = (before(self.pictures[0], position),)
        self._detach_rings()
        self.rope_lengths = self.rope_lengths if position > start else (0,)
        if self._last_logits is not None and self._last_logits[0] > position - start:
            self._last_logits = None
        self.version += 1
        return position - start

    @staticmethod
    def join(caches: Sequence[SequenceCache]) -> SequenceCache:
        """One cache of the rows of several, in order. They hand their blocks over and must not be used any more; of one
        it is that one."""
        if len(caches) == 1:
            return caches[0]
        joined = copy.copy(caches[0])
        joined.start = tuple(start for cache in caches for start in cache.start)
        joined.next_position = tuple(position for cache in caches for position in cache.next_position)
        joined.rope_lengths = tuple(length for cache in caches for length in cache.rope_lengths)
        joined.pictures = tuple(pictures for cache in caches for pictures in cache.pictures)
        joined.is_consistent = all(cache.is_consistent for cache in caches)
        joined.layers = [LayerCache.join(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
        joined._last_logits = None
        joined.version += 1
        return joined

    def split(self) -> list[SequenceCache]:
        """A cache of each row. This one hands its blocks over and must not be used any more; of one row it is that."""
        if self.batch_size == 1:
            return [self]
        rows = [copy.copy(self) for _ in self.next_position]
        for i, row in enumerate(rows):
            row.layers = [copy.copy(layer) for layer in self.layers]
            row.select_rows([i])
        return rows

    def growth(self, row: int, tokens: int) -> int:
        """Bytes of the blocks that a row takes for so many more tokens, which begin no chunk but with the first."""
        total = 0
        for window, size in self._block_bytes.items():
            past = self._next_slot(row, window)
            total += (LayerCache.num_blocks(past + tokens) - LayerCache.num_blocks(past)) * size
        return total

    def num_bytes_of(self, length: int) -> int:
        """Bytes of the blocks of a row that has come to so many tokens, in the layers where it took most. Of a ring
        that has come round there is one more: the copy of that which is written to next, which may be shared."""
        total = 0
        for window, size in self._block_bytes.items():
            blocks = LayerCache.num_blocks(length if window is None else min(length, window))
            total += (blocks + (isinstance(window, SlidingWindow) and length > window)) * size
        return total

    def drop_chunks(self, row: int) -> None:
        """Free what the next token of a row does not see, at once rather than when that token comes."""
        for layer, window in zip(self.layers, self.windows, strict=True):
            layer.reserve(row, self.cached_tokens(row, self.next_position[row], window), 0)

    def full_block(self, row: int, index: int) -> list[Tensor]:
        """The block of each layer that holds tokens `index * CACHE_BLOCK` and on of a row, whose chunk is still held.

        Every window is a whole number of blocks, and the row begins at position 0.
        """
        offsets = [slot_of(index * CACHE_BLOCK, window) // CACHE_BLOCK for window in self.windows]
        return [layer.rows[row][offset] for layer, offset in zip(self.layers, offsets, strict=True)]

    def share(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Begin the only row, which is empty, with full blocks of another cache: of each the block of every layer."""
        assert self.batch_size == 1 and self.next_position == (0,)
        end = len(blocks) * CACHE_BLOCK
        for i, (layer, window) in enumerate(zip(self.layers, self.windows, strict=True)):
            first = (end - held_tokens(end, window)) // CACHE_BLOCK
            kept = [block[i] for block in blocks[first:]]
            turn = first % len(kept) if kept and isinstance(window, SlidingWindow) else 0
            layer.rows[0][:] = kept[len(kept) - turn :] + kept[: len(kept) - turn]
        self.commit((0,), (end,), self.rope_lengths)
