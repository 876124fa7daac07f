"""A batch as packed tokens: the tokens of all rows one after the other, without padding.

Every layer but attention computes each token alone, so the decoder runs over N packed tokens: padding costs nothing,
reaches no expert and moves no position. What attention must know, which tokens see each other, is a list of `Span`s,
computed once per forward on the host and shared by all layers with the same window.

Shapes: B rows, T columns with padding, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from llama4.cache.pictures import Sight
from llama4.config.window import SlidingWindow, chunk_end, chunk_start, slot_of
from llama4.errors import Llama4Error
from llama4.ops.memory import to_device


@dataclass(frozen=True)
class Span:
    """Packed tokens [begin, end): new tokens of one row and one chunk. They see each other causally, and all of the
    first `past` slots of the row in the cache of a layer with this window, behind which they go.

    `is_last` says that the row's next token may see them: of a row that crosses chunk borders only the last chunk is
    kept. With a window that slides nothing is cut, and `past` is what the first of them sees.

    Attributes:
        before: tokens of the row's sequence before them.
    """

    row: int
    begin: int
    end: int
    past: int
    is_last: bool
    before: int

    def slot(self, window: int | None) -> int:
        """Where the first of them goes in a layer with this window."""
        return slot_of(self.before, window) if isinstance(window, SlidingWindow) else self.past


@dataclass(frozen=True)
class Batch:
    """Where each row's tokens are in the packed run, and at which positions of their sequences.

    Attributes:
        start: position of the first token of each row's sequence, that of the cache included.
        query_start: position of each row's first new token.
        lengths: new tokens of each row.
        rope_lengths: length of each row as RoPE sees it, where its frequencies depend on it: see `SequenceCache`.
        columns: T.
        positions_N: position of each packed token.
        index_N: flat places b * T + t of the packed tokens; None if nothing is padded.
        sight: what layers of cross-attention see; None if no token sees a picture.
    """

    start: tuple[int, ...]
    query_start: tuple[int, ...]
    lengths: tuple[int, ...]
    rope_lengths: tuple[int, ...]
    columns: int
    positions_N: Tensor
    index_N: Tensor | None
    sight: Sight | None = None
    _spans: dict[int | None, list[Span]] = field(default_factory=dict)
    _key_lengths: dict[int | None, Tensor] = field(default_factory=dict)
    _slots: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def next_position(self) -> tuple[int, ...]:
        """Position behind the last new token of each row."""
        return tuple(start + length for start, length in zip(self.query_start, self.lengths, strict=True))

    @property
    def is_decode(self) -> bool:
        """Whether there is one new token in every row: a step of decoding."""
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
        return to_device(ends, self.positions_N.device)

    def unpack_last(self, x_R: Tensor) -> Tensor:
        """What was computed for `last_tokens`, [R, ...] -> [B, 1, ...], zeros where a row has no token."""
        rows = [row for row, length in enumerate(self.lengths) if length]
        if len(rows) == len(self.lengths):
            return x_R[:, None]
        full = x_R.new_zeros(len(self.lengths), *x_R.shape[1:])
        return full.index_copy(0, to_device(rows, x_R.device), x_R)[:, None]

    def rope_lengths_N(self) -> Tensor:
        """`rope_lengths` of each packed token's row."""
        device = self.positions_N.device
        return torch.tensor(self.rope_lengths).repeat_interleave(torch.tensor(self.lengths)).to(device)

    def spans(self, window: int | None) -> list[Span]:
        """The new tokens cut at chunk borders, for layers with this window."""
        if window not in self._spans:
            self._spans[window] = list(self._cut(window))
        return self._spans[window]

    def _cut(self, window: int | None) -> Iterator[Span]:
        offset = 0
        for row, (first, length) in enumerate(zip(self.query_start, self.lengths, strict=True)):
            position, end = first, first + length
            while position < end:
                border = min(end, chunk_end(position, window) or end)
                begin, past = offset + position - first, position - chunk_start(position, window, self.start[row])
                before = position - self.start[row]
                yield Span(row, begin, begin + border - position, past, is_last=border == end, before=before)
                position = border
            offset += length

    def key_lengths(self, window: int | None) -> Tensor:
        """In a step of decoding: how many keys each row's token sees in layers with this window, its own included, [B]
        int64."""
        if window not in self._key_lengths:
            lengths = [span.past + 1 for span in self.spans(window)]
            self._key_lengths[window] = to_device(lengths, self.positions_N.device)
        return self._key_lengths[window]

    def slots(self, window: int | None) -> Tensor:
        """In a step of decoding: where each row's token goes in layers with this window, [B] int64."""
        if window not in self._slots:
            slots = [span.slot(window) for span in self.spans(window)]
            self._slots[window] = to_device(slots, self.positions_N.device)
        return self._slots[window]


def make_batch(
    batch_size: int,
    columns: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    start: Sequence[int] | None = None,
    next_position: Sequence[int] | None = None,
    rope_lengths: Sequence[int] | None = None,
) -> Batch:
    """Lay out a batch [B, T].

    Args:
        attention_mask: [B, T], true or 1 at tokens, false or 0 at padding, on either side.
        positions: [B, T] or [T]; of each row the tokens' positions must be consecutive. Default: what follows the
            cache, or 0.
        start, next_position, rope_lengths: of the cache; None without one.

    Raises:
        Llama4Error: a mask or positions of another shape, padding inside a row, positions with gaps or that do not
            follow the cache.
    """
    lengths, offsets, index = [columns] * batch_size, [0] * batch_size, None
    if attention_mask is not None:
        if attention_mask.shape != (batch_size, columns):
            raise Llama4Error(f"attention_mask must be [{batch_size}, {columns}], not {list(attention_mask.shape)}")
        mask = attention_mask.to(device=device, dtype=torch.bool)
        lengths = mask.sum(1).tolist()
        if sum(lengths) < batch_size * columns:
            offsets = mask.int().argmax(1).tolist()
            index = mask.flatten().nonzero().squeeze(1)
            runs = [b * columns + offsets[b] + t for b in range(batch_size) for t in range(lengths[b])]
            if index.tolist() != runs:
                raise Llama4Error(
                    "attention_mask has padding between a row's tokens; it may stand before or after them only"
                )
    query_start = list(next_position) if next_position is not None else [0] * batch_size
    if positions is not None:
        given_BT = positions.expand(batch_size, columns)
        query_start = _given_positions(given_BT, lengths, offsets, query_start, start, next_position)
    packed_positions = [
        torch.arange(first, first + length, device=device) for first, length in zip(query_start, lengths, strict=True)
    ] or [torch.empty(0, dtype=torch.long, device=device)]
    if start is None or next_position is None:
        begin = query_start
    else:
        begin = [query_start[b] if start[b] == next_position[b] else start[b] for b in range(batch_size)]
    ends = [first + length for first, length in zip(query_start, lengths, strict=True)]
    return Batch(
        start=tuple(begin),
        query_start=tuple(query_start),
        lengths=tuple(lengths),
        rope_lengths=tuple(known or end for known, end in zip(rope_lengths or [0] * batch_size, ends, strict=True)),
        columns=columns,
        positions_N=packed_positions[0] if len(packed_positions) == 1 else torch.cat(packed_positions),
        index_N=index,
    )


def _given_positions(
    positions_BT: Tensor,
    lengths: Sequence[int],
    offsets: Sequence[int],
    default: Sequence[int],
    start: Sequence[int] | None,
    next_position: Sequence[int] | None,
) -> list[int]:
    """The first position of each row of explicit `positions`, checked to be consecutive and to follow the cache."""
    result = list(default)
    for b, row in enumerate(positions_BT.tolist()):
        own = row[offsets[b] : offsets[b] + lengths[b]]
        if not own:
            continue
        if own[0] < 0 or own != list(range(own[0], own[0] + len(own))):
            raise Llama4Error(f"positions of row {b} must be consecutive and not negative, not {own[:8]}...")
        if start is not None and next_position is not None and start[b] != next_position[b] != own[0]:
            raise Llama4Error(f"positions of row {b} start at {own[0]}, but the cache goes on at {next_position[b]}")
        result[b] = own[0]
    return result
