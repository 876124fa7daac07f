"""Pictures of a prompt that is read in pieces: every patch gets its feature, however tiles are encoded together."""

from __future__ import annotations

import pytest
import torch

from llama4.engine.prompt import PromptPictures
from llama4.inputs import Inputs
from tests import small_model

TILES = 5


@pytest.mark.parametrize("at_once", [1, 2, 3, 32])
def test_tiles_are_encoded_together(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptPictures, "_at_once", at_once)
    model = small_model.model().requires_grad_(False)
    assert model.config.vision is not None
    patches = [model.config.image_token_index] * model.config.vision.tokens_per_tile
    ids = [1, 2, *patches * 2, 3, *patches * (TILES - 2), 4]
    tiles = torch.randn(TILES, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = Inputs(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), tiles, None)
    whole = model.encode_images(tiles)
    for size in range(1, len(ids) + 1):
        pictures = PromptPictures(model, inputs, ids)
        pieces = [pictures.piece(ids, begin, min(begin + size, len(ids))) for begin in range(0, len(ids), size)]
        features = torch.cat([part for piece in pieces for part in piece.features])
        assert torch.allclose(features, whole, atol=1e-5), "products of several tiles add up in another order"
