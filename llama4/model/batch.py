"""Rows of a batch -> one run of tokens without padding, and back.

Every layer but attention treats tokens alone, so the decoder works on N packed tokens and padding costs nothing,
reaches no expert and moves no position. What attention must know, which tokens see each other, is a list of
`Segment`s, computed once per forward on the host and shared by all layers.

Shapes: B rows, T columns with padding, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """New tokens [start, end) of the packed run, of one row, that see each other causally and `past` cached tokens
    before.

    `past` is also where the first of them goes in the cache of a layer with this window. `last` says that later tokens
    of the row will need them: of a row that crosses chunk borders only its last chunk is kept.
    """

    row: int
    start: int
    end: int
    past: int
    last: bool


@dataclass(frozen=True)
class Step:
    """One new token in every row: its slot in the cache of a layer, and how many keys it sees there, with its own."""

    slots: list[int]
    lengths_B: Tensor

    @property
    def longest(self) -> int:
        return max(self.slots) + 1

    @property
    def is_ragged(self) -> bool:
        return min(self.slots) + 1 != self.longest


@dataclass(frozen=True)
class Batch:
    """Where each row's tokens stand in the packed run, and at which positions of their sequences.

    `firsts[b]` is the position of the first token of row b's sequence, that of the cache included; `starts[b]` the
    position of its first new token; `lengths[b]` how many new ones there are.
    """

    firsts: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    columns: int
    positions_N: Tensor
    index_N: Tensor | None
    """Flat places b * T + t of the packed tokens; None if nothing is padded."""
    _segments: dict[int | None, list[Segment]] = field(default_factory=dict)
    _steps: dict[int | None, Step] = field(default_factory=dict)

    @property
    def is_step(self) -> bool:
        """One new token in every row: a step of decoding."""
        return all(length == 1 for length in self.lengths)

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = x_BT.flatten(0, 1)
        return flat if self.index_N is None else flat[self.index_N]

    def unpack(self, x_N: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], zeros at padding."""
        shape = (len(self.lengths), self.columns, *x_N.shape[1:])
        if self.index_N is None:
            return x_N.view(shape)
        flat = x_N.new_zeros(shape[0] * shape[1], *shape[2:])
        return flat.index_copy(0, self.index_N, x_N).view(shape)

    def last_tokens(self) -> Tensor:
        """Packed places of the last token of every row that has one."""
        ends = [end - 1 for end, length in zip(accumulate(self.lengths), self.lengths, strict=True) if length]
        return torch.tensor(ends, dtype=torch.long, device=self.positions_N.device)

    def unpack_last(self, x_R: Tensor) -> Tensor:
        """What was computed for `last_tokens`, [R, ...] -> [B, 1, ...], zeros where a row has no token."""
        rows = [row for row, length in enumerate(self.lengths) if length]
        if len(rows) == len(self.lengths):
            return x_R[:, None]
        full = x_R.new_zeros(len(self.lengths), *x_R.shape[1:])
        return full.index_copy(0, torch.tensor(rows, dtype=torch.long, device=x_R.device), x_R)[:, None]

    def _slot(self, row: int, position: int, window: int | None) -> int:
        """How many earlier tokens of its row a token at `position` can see: those since the row's first, or its
        chunk's."""
        begin = self.firsts[row]
        return position - (begin if window is None else max(begin, position // window * window))

    def segments(self, window: int | None) -> list[Segment]:
        """The new tokens cut at chunk borders, for layers with chunks of `window` tokens (None: never cut)."""
        if window not in self._segments:
            self._segments[window] = list(self._cut(window))
        return self._segments[window]

    def _cut(self, window: int | None) -> list[Segment]:
        segments, offset = [], 0
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            position, end = start, start + length
            while position < end:
                border = end if window is None else min(end, (position // window + 1) * window)
                at = offset + position - start
                past = self._slot(row, position, window)
                segments.append(Segment(row, at, at + border - position, past, last=border == end))
                position = border
            offset += length
        return segments

    def step(self, window: int | None) -> Step:
        """Where a step's tokens go in layers with chunks of `window` tokens."""
        if window not in self._steps:
            slots = [self._slot(row, start, window) for row, start in enumerate(self.starts)]
            lengths = torch.tensor([slot + 1 for slot in slots], device=self.positions_N.device)
            self._steps[window] = Step(slots, lengths)
        return self._steps[window]


def make_batch(
    batch_size: int,
    columns: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    firsts: Sequence[int] | None = None,
    nexts: Sequence[int] | None = None,
) -> Batch:
    """Lay out a batch [B, T].

    Args:
        attention_mask: [B, T], true or 1 at tokens, false or 0 at padding, on either side.
        positions: [B, T] or [T]; of each row the tokens' positions must be consecutive. Default: what follows the
        cache, or 0. firsts, nexts: of the cache, each row's first and next position; None without a cache.

    Raises:
        ValueError: a mask or positions of another shape, padding inside a row, positions with gaps or that do not
            follow the cache.
    """
    lengths, offsets, index = [columns] * batch_size, [0] * batch_size, None
    if attention_mask is not None:
        if attention_mask.shape != (batch_size, columns):
            raise ValueError(f"attention_mask must be [{batch_size}, {columns}], not {list(attention_mask.shape)}")
        mask = attention_mask.to(device=device, dtype=torch.bool)
        lengths = mask.sum(1).tolist()
        if sum(lengths) < batch_size * columns:
            offsets = mask.int().argmax(1).tolist()
            index = mask.flatten().nonzero().squeeze(1)
            runs = [b * columns + offsets[b] + t for b in range(batch_size) for t in range(lengths[b])]
            if index.tolist() != runs:
                raise ValueError(
                    "attention_mask has padding between a row's tokens; it may stand before or after them only"
                )
    starts = list(nexts) if nexts is not None else [0] * batch_size
    if positions is not None:
        starts = _given_starts(positions.expand(batch_size, columns), lengths, offsets, starts, firsts, nexts)
    packed_positions = [
        torch.arange(start, start + length, device=device) for start, length in zip(starts, lengths, strict=True)
    ]
    if firsts is None or nexts is None:
        begin = starts
    else:
        begin = [starts[b] if firsts[b] == nexts[b] else firsts[b] for b in range(batch_size)]
    return Batch(
        firsts=tuple(begin),
        starts=tuple(starts),
        lengths=tuple(lengths),
        columns=columns,
        positions_N=torch.cat(packed_positions)
        if packed_positions
        else torch.empty(0, dtype=torch.long, device=device),
        index_N=index,
    )


def _given_starts(
    positions_BT: Tensor,
    lengths: Sequence[int],
    offsets: Sequence[int],
    starts: Sequence[int],
    firsts: Sequence[int] | None,
    nexts: Sequence[int] | None,
) -> list[int]:
    """The first position of each row of explicit `positions`, checked to be consecutive and to follow the cache."""
    result = list(starts)
    for b, row in enumerate(positions_BT.tolist()):
        own = row[offsets[b] : offsets[b] + lengths[b]]
        if not own:
            continue
        if own[0] < 0 or own != list(range(own[0], own[0] + len(own))):
            raise ValueError(f"positions of row {b} must be consecutive and not negative, not {own[:8]}...")
        if firsts is not None and nexts is not None and firsts[b] != nexts[b] and own[0] != nexts[b]:
            raise ValueError(f"positions of row {b} start at {own[0]}, but the cache goes on at {nexts[b]}")
        result[b] = own[0]
    return result
