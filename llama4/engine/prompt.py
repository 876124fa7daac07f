"""Prompts cut into pieces: their tokens, and what stands for pictures among them.

Shapes: B rows, T columns, D hidden size, n tiles, Q tokens per tile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.inputs import Inputs
from llama4.model.device import free_memory
from llama4.model.multimodal import Llama4Model
from llama4.progress import inner_bar

TILES_AT_ONCE = 32
"""At most, on a GPU: their activations take 0.6 GB in a tower of Llama 4's size."""


@dataclass(frozen=True)
class Piece:
    """Some tokens of a prompt.

    Attributes:
        features: what stands for each `<|patch|>` among them, [n * Q, D] in parts.
        grids: `image_grids` of the pictures among them, in parts; none where the model takes none.
    """

    ids: Sequence[int]
    features: Sequence[Tensor] = ()
    grids: Sequence[Tensor] = ()


def split_rows(model: Llama4Model, inputs: Inputs) -> list[Inputs]:
    """A batch as one of each prompt, without padding, each with its own pictures."""
    is_token_BT, vision = inputs.attention_mask.bool(), model.config.vision
    patches_B = ((inputs.input_ids == model.config.image_token_index) & is_token_BT).sum(1)
    per_tile = vision.tokens_per_tile if vision is not None else 1
    ends = (patches_B.cumsum(0) // per_tile).tolist()
    ends[-1] = None  # tiles that are too many are said to be so with the last prompt
    rows, begin = [], 0
    for ids_T, mask_T, end in zip(inputs.input_ids, is_token_BT, ends, strict=True):
        own = ids_T[mask_T][None]
        both = (each[begin:end] if each is not None else None for each in (inputs.pixel_values, inputs.image_grids))
        tiles, grids = (each if each is not None and len(each) else None for each in both)
        rows.append(Inputs(own, torch.ones_like(own), tiles, grids))
        begin = end
    return rows


class PromptPictures:
    """The tiles of a prompt, each encoded when the tokens that stand for it are read.

    Raises:
        Llama4Error: the prompt has more or fewer patches than the tiles give.
    """

    def __init__(self, model: Llama4Model, inputs: Inputs, ids: Sequence[int]) -> None:
        self._model, self._pixel_values, self._grids = model, inputs.pixel_values, inputs.image_grids
        pixel_values = inputs.pixel_values
        self._prompt_length = len(ids)
        self._patch, vision = model.config.image_token_index, model.config.vision
        self._places = [i for i, id_ in enumerate(ids) if id_ == self._patch]
        self._per_tile = vision.tokens_per_tile if vision is not None else 0
        given = self._per_tile * (len(pixel_values) if pixel_values is not None else 0)
        if len(self._places) != given:
            raise Llama4Error(
                f"the prompt holds {len(self._places)} {model.image_name} tokens, but its images give {given} "
                "features; let the processor of this model prepare both"
            )
        self._encoded: tuple[range, Tensor] | None = None  # a tile may be read in two pieces

    def forget(self) -> None:
        """Free what was encoded."""
        self._encoded = None

    def piece(self, ids: Sequence[int], begin: int, end: int) -> Piece:
        """Tokens [begin, end) of prompt and reply."""
        return Piece(ids[begin:end], self._features(ids, begin, end), self._grids_of(begin, end))

    def up_to_second(self, begin: int, size: int) -> int:
        """How many of so many tokens from `begin` on are before a second picture, where a picture is thousands of keys
        for layers of cross-attention, and takes as long to encode, though it is one token."""
        second = bisect_left(self._places, begin) + 1
        return size if self._grids is None or second >= len(self._places) else min(size, self._places[second] - begin)

    def _features(self, ids: Sequence[int], begin: int, end: int) -> list[Tensor]:
        """A `<|patch|>` that the model itself wrote is no picture, but its own embedding."""
        first, last = bisect_left(self._places, begin), bisect_left(self._places, end)
        parts = []
        tiles = range(first // self._per_tile, -(-last // self._per_tile)) if first < last else range(0)
        at, per_tile = tiles.start, self._per_tile
        with inner_bar("looking at pictures", len(tiles), "tiles") as bar:
            while at < tiles.stop:
                run = self._run(at, tiles.stop)
                next_ = min(run.stop, tiles.stop)
                with bar.step(next_ - at):
                    features = self._encode(run)
                wanted = slice(max(first, at * per_tile), min(last, next_ * per_tile))
                parts.append(features[wanted.start - run.start * per_tile : wanted.stop - run.start * per_tile])
                at = next_
        if written := ids[max(begin, self._prompt_length) : end].count(self._patch):
            patches = torch.full((written,), self._patch, device=self._model.device)
            parts.append(self._model.language_model.model.embed_tokens(patches))
        return parts

    def _grids_of(self, begin: int, end: int) -> list[Tensor]:
        if self._grids is None:
            return []
        return [self._grids[bisect_left(self._places, begin) : bisect_left(self._places, end)]]

    def keys(self, begin: int, end: int) -> int:
        """Keys that layers of cross-attention keep of the pictures among these tokens."""
        vision = self._model.config.vision
        per_tile = vision.keys_per_tile if vision is not None else 0
        return sum(int(part.prod(dim=1).sum()) for part in self._grids_of(begin, end)) * per_tile

    @property
    def _at_once(self) -> int:
        """Tiles that are encoded together: one gives a CPU's kernels enough to do. On a GPU their activations take a
        quarter of the free memory at most."""
        device, vision = self._model.device, self._model.config.vision
        if device.type == "cpu" or self._grids is not None or vision is None:
            return 1
        per_tile = vision.activation_bytes(self._model.dtype.itemsize)
        return max(1, min(TILES_AT_ONCE, int(free_memory(device) / 4 / per_tile)))

    def _run(self, tile: int, end: int) -> range:
        """Tiles that are encoded together: those that were, if this is one of them, else it and others before `end`."""
        if self._encoded is not None and tile in self._encoded[0]:
            return self._encoded[0]
        return range(tile, min(tile + self._at_once, end))

    def _encode(self, run: range) -> Tensor:
        """What stands for these tiles."""
        assert self._pixel_values is not None
        if self._encoded is None or self._encoded[0] != run:
            grids = self._grids[run.start : run.stop] if self._grids is not None else None
            self._encoded = run, self._model.encode_images(self._pixel_values[run.start : run.stop], grids)
        return self._encoded[1]
