"""Pictures in a sequence, as layers of cross-attention see them: which tokens see which, and their keys and values.

A picture is one token. Its keys and values are computed once in each such layer, from the features of its patches, and
never change. A token sees the last picture before it, or that and those right before it where several stand side by
side; a picture's own token sees it, too. A token before all pictures sees none, and layers of cross-attention leave it
as it is. Source: `create_vision_mask` in models/llama3/multimodal/utils.py of Meta's llama-models.

Shapes: N packed tokens, S patches of a picture's tiles, D hidden size, K key/value heads, C head_dim.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """A picture that the cache holds.

    Attributes:
        position: of its token in the sequence.
        layers: keys and values of each layer of cross-attention, [2, K, S, C].
    """

    position: int
    layers: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class NewPicture(NamedTuple):
    """A picture whose token is in the batch: its position, and the features of its patches, [S, D]."""

    position: int
    features: Tensor


class Look(NamedTuple):
    """Packed tokens [begin, end) of one row, which see pictures [first, last) of the row."""

    row: int
    begin: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class Sight:
    """What the tokens of a batch see of pictures.

    Attributes:
        new: the new pictures of each row, which come after those in the cache.
        looks: which tokens see which; those that see none are left out.
        tokens: the packed places of those that see one.
    """

    new: tuple[tuple[NewPicture, ...], ...]
    looks: tuple[Look, ...]
    tokens: Tensor


def make_sight(
    known: Sequence[Sequence[int]],
    new: Sequence[Sequence[NewPicture]],
    query_start: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
) -> Sight | None:
    """Lay out what a batch sees; None if no token sees a picture.

    Args:
        known: positions of the pictures that the cache holds, of each row.
        new: the new pictures of each row.
        query_start, lengths: position of each row's first new token, and how many it has.
    """
    looks: list[Look] = []
    offset = 0
    for row, (old, added, start, length) in enumerate(zip(known, new, query_start, lengths, strict=True)):
        positions = [*old, *(picture.position for picture in added)]
        looks += [
            Look(row, offset + begin - start, offset + end - start, first, last)
            for begin, end, first, last in _cut(positions, start, start + length)
        ]
        offset += length
    if not looks:
        return None
    places = torch.cat([torch.arange(look.begin, look.end, device=device) for look in looks])
    return Sight(tuple(map(tuple, new)), tuple(looks), places)


def _cut(positions: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of positions [start, end) that see the same pictures, and which these are."""
    first = 0
    for i, position in enumerate(positions):
        if i and position != positions[i - 1] + 1:
            first = i
        begin = max(position, start)
        stop = min(positions[i + 1] if i + 1 < len(positions) else end, end)
        if begin < stop:
            yield begin, stop, first, i + 1


class PictureView:
    """One layer of cross-attention in the cache, for one batch."""

    def __init__(self, known: Sequence[Sequence[Picture]], layer: int) -> None:
        self._known, self._layer = known, layer
        self.new: list[list[Tensor]] = []

    def write(self, keys_values: list[list[Tensor]]) -> None:
        """Take the keys and values of the new pictures of each row."""
        self.new = [[each.detach() for each in row] for row in keys_values]

    def read(self, row: int) -> list[Tensor]:
        """Keys and values of a row's pictures that the cache held before."""
        return [picture.layers[self._layer] for picture in self._known[row]]


def before(pictures: Sequence[Picture], position: int) -> tuple[Picture, ...]:
    """Those whose tokens stand before a position."""
    return tuple(pictures[: bisect_left([picture.position for picture in pictures], position)])
