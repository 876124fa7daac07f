"""A row's answer never depends on its batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from llama4.model.multimodal import Llama4Model
from tests import small_model

PATCH = small_model.config().image_token_index


def row(length: int, tiles: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids with one `<|patch|>` per tile somewhere in them, and the tiles."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 800, (length,), generator=generator)
    ids[torch.randperm(length, generator=generator)[:tiles].sort().values] = PATCH
    return ids, torch.randn(tiles, 3, 28, 28, generator=generator)


def logprobs(model: Llama4Model, rows: list[tuple[Tensor, Tensor]], pad_left: bool, steps: Tensor) -> list[Tensor]:
    """Of every token of each row, and of `steps` that all rows go on with."""
    longest = max(len(ids) for ids, _ in rows)
    padded, mask = torch.full((len(rows), longest), small_model.RANKS + 18), torch.zeros(len(rows), longest)
    for i, (ids, _) in enumerate(rows):
        place = slice(longest - len(ids), None) if pad_left else slice(len(ids))
        padded[i, place], mask[i, place] = ids, 1
    tiles = torch.cat([tiles for _, tiles in rows])
    cache = model.new_cache(len(rows))
    logits = model(padded, attention_mask=mask, pixel_values=tiles if len(tiles) else None, cache=cache)
    decoded = [model(step.expand(len(rows), 1), cache=cache) for step in steps]
    return [
        torch.cat([logits[i, mask[i] == 1], *(step[i] for step in decoded)]).log_softmax(-1) for i in range(len(rows))
    ]


@pytest.mark.parametrize("pad_left", [True, False])
@pytest.mark.parametrize("size", [2, 8, 33])
@torch.inference_mode()
def test_same_logprobs_in_any_batch_at_any_place(size: int, pad_left: bool) -> None:
    """Within 1e-5 in float32, where sums over a batch may be ordered otherwise. Rows cross chunk borders (32) while
    they are read and while they go on."""
    model, rng = small_model.model(), random.Random(size)
    steps = torch.randint(0, 800, (12, 1, 1), generator=torch.Generator().manual_seed(0))
    mine = row(25, 2, seed=100)
    (alone,) = logprobs(model, [mine], pad_left, steps)
    neighbours = [row(rng.choice([1, 7, 31, 32, 33, 70]), 0, i) for i in range(size - 1)]
    neighbours = [row(len(ids), rng.randint(0, min(3, len(ids))), i) for i, (ids, _) in enumerate(neighbours)]
    for place in {0, size // 2, size - 1}:
        batch = [*neighbours[:place], mine, *neighbours[place:]]
        torch.testing.assert_close(logprobs(model, batch, pad_left, steps)[place], alone, rtol=0, atol=1e-5)
