"""Pictures of a prompt that is read in pieces: every patch gets its feature, however tiles are encoded together."""

from __future__ import annotations

from contextlib import _GeneratorContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from llama4.config import PRESETS
from llama4.engine import prompt
from llama4.engine.prompt import TILES_AT_ONCE, PromptPictures
from llama4.inputs import Inputs
from llama4.model.multimodal import Llama4Model
from llama4.progress import Bar
from tests import small_model

TILES, PER_TILE = 5, 4


@pytest.fixture(scope="module")
def model() -> Llama4Model:
    """Its tiles are several tokens each, so that a piece may end within one."""
    config = small_model.config()
    assert config.vision is not None
    model = Llama4Model(replace(config, vision=replace(config.vision, image_size=56))).eval().requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def given(model: Llama4Model) -> tuple[list[int], Tensor, Inputs]:
    """A prompt with two pictures, its tiles, and both together."""
    patches = [model.config.image_token_index] * PER_TILE
    ids = [1, 2, *patches * 2, 3, *patches * (TILES - 2), 4]
    tiles = torch.randn(TILES, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return ids, tiles, Inputs(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), tiles, None)


@pytest.mark.parametrize("at_once", [1, 2, 3, 32])
def test_tiles_are_encoded_together(model: Llama4Model, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the bar counts those of a piece, encoded or at hand."""
    steps: list[float] = []

    class Counting(Bar):
        def step(self, amount: float) -> _GeneratorContextManager[None]:
            steps.append(amount)
            return super().step(amount)

    monkeypatch.setattr(prompt, "inner_bar", lambda *arguments: Counting(*arguments, shown=False))
    monkeypatch.setattr(PromptPictures, "_at_once", at_once)
    ids, tiles, inputs = given(model)
    places = [i for i, id_ in enumerate(ids) if id_ == model.config.image_token_index]
    whole = model.encode_images(tiles)
    for size in range(1, len(ids) + 1):
        pictures = PromptPictures(model, inputs, ids)
        features: list[Tensor] = []
        for begin in range(0, len(ids), size):
            steps.clear()
            features += pictures.piece(ids, begin, min(begin + size, len(ids))).features
            read = {i // PER_TILE for i, place in enumerate(places) if begin <= place < begin + size}
            assert sum(steps) == len(read)
        assert torch.allclose(torch.cat(features), whole, atol=1e-5), (
            "products of several tiles add up in another order"
        )


def test_a_patch_that_the_model_wrote_is_its_embedding(model: Llama4Model) -> None:
    """Also where prompt and reply are read in one piece, as after a request was put back."""
    ids, tiles, inputs = given(model)
    patch = model.config.image_token_index
    features = torch.cat([*PromptPictures(model, inputs, ids).piece([*ids, patch, 7], 0, len(ids) + 2).features])
    embedding = model.language_model.model.embed_tokens(torch.tensor([patch]))
    assert torch.allclose(features, torch.cat([model.encode_images(tiles), embedding]), atol=1e-5)


SCOUTS_TILE = 2 * 577 * (3 + 8) * 1408
"""Bytes: three rows of the tower's width for each patch, and two four times as wide in the MLP."""


@pytest.mark.parametrize(
    ("device", "free", "tiles"),
    [("cpu", 1 << 40, 1), ("cuda", 1 << 40, TILES_AT_ONCE), ("cuda", 4 * SCOUTS_TILE * 5, 5), ("cuda", 0, 1)],
)
def test_as_many_tiles_as_the_memory_allows(
    device: str, free: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "free_memory", lambda _: free)
    scout = SimpleNamespace(config=PRESETS["scout"](), device=torch.device(device), dtype=torch.bfloat16)
    no_ids = torch.zeros(1, 0, dtype=torch.long)
    pictures = PromptPictures(cast(Llama4Model, scout), Inputs(no_ids, no_ids, None, None), [])
    assert pictures._at_once == tiles
