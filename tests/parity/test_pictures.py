"""Pictures of odd sizes, all the way to logits: our processor and model against transformers' processor and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_models.llama4.tokenizer as meta
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Llama4ImageProcessor, Llama4Processor

from llama4.config import Llama4Config
from llama4.inputs import Inputs, Processor
from llama4.model.multimodal import Llama4Model
from llama4.text.tokenizer import Tokenizer
from tests.parity.references import CHUNK, ReferenceModel, reference_config, reference_model, relative_error

GENUINE = Path(meta.__file__).with_name("tokenizer.model")
RANKS, SPECIAL, SIDE, TILES = 1000, 128, 56, 4
SIZES = [(1, 1), (31, 57), (57, 31), (56, 56), (113, 55), (224, 57), (7, 300), (301, 299)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The genuine vocabulary's first ranks, beside the tokenizer.json that transformers reads."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(b"\n".join(GENUINE.read_bytes().splitlines()[:RANKS]))
    tokenizer = Tokenizer(directory / "tokenizer.model", num_special_tokens=SPECIAL)
    (directory / "saved").mkdir()
    tokenizer.save(directory / "saved")
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["scout", "maverick"])
def models(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> tuple[Llama4Model, ReferenceModel]:
    config = reference_config(request.param, vocab_size=RANKS + SPECIAL)
    config.image_token_index = tokenizer.special("<|patch|>")
    theirs = reference_model(config)
    ours = Llama4Model(Llama4Config.from_dict(config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


def picture(width: int, height: int) -> Image.Image:
    """Noise over a gradient, the same on every run."""
    generator = torch.Generator().manual_seed(width * 1000 + height)
    noise = torch.randint(0, 128, (height, width, 3), generator=generator)
    slope = torch.linspace(0, 127, width).long()[None, :, None]
    return Image.fromarray((noise + slope).to(torch.uint8).numpy())


def question(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": picture(*size)} for size in sizes]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": "Which of these has more red in it?"}]}]


def prepare(tokenizer: Tokenizer, *sizes: tuple[int, int]) -> Inputs:
    return Processor(tokenizer, image_size=SIDE, max_tiles=TILES)(question(*sizes))


@pytest.mark.parametrize("sizes", [[size] for size in SIZES] + [SIZES], ids=lambda sizes: f"{len(sizes)}-{sizes[0]}")
@torch.inference_mode()
def test_from_picture_to_logits(
    tokenizer: Tokenizer, models: tuple[Llama4Model, ReferenceModel], sizes: list[tuple[int, int]]
) -> None:
    ours, theirs = models
    image_processor = Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=TILES)
    processor = Llama4Processor(image_processor, AutoTokenizer.from_pretrained(tokenizer.path.parent / "saved"))
    wanted: Any = processor.apply_chat_template(
        question(*sizes), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    given = prepare(tokenizer, *sizes)
    assert torch.equal(given.input_ids, wanted["input_ids"])
    # transformers normalises in bfloat16: half a level of 255, and the values lie between -1 and 1. Enough to send a
    # token to another expert, so logits are compared on the same pixels.
    pixels = wanted["pixel_values"].flatten(0, -4).float()
    torch.testing.assert_close(given.pixel_values, pixels, atol=0.51 / 127.5, rtol=0)
    logits = ours(given.input_ids, pixel_values=pixels)
    assert relative_error(logits, theirs(wanted["input_ids"], pixel_values=pixels).logits) < 1e-5


@torch.inference_mode()
def test_pictures_token_by_token(tokenizer: Tokenizer, models: tuple[Llama4Model, ReferenceModel]) -> None:
    """Several tiles, several chunks, and every image spread over as many calls as it has tokens."""
    ours, theirs = models
    given = prepare(tokenizer, (113, 55), (30, 300), (41, 40))
    ids, pixels = given.input_ids, given.pixel_values
    assert pixels is not None
    assert ids.shape[1] > 2 * CHUNK
    features, cache, steps = ours.encode_images(pixels), ours.new_cache(), []
    for id_11 in ids.split(1, dim=1):
        is_patch = int(id_11) == ours.config.image_token_index
        mine, features = (features[:1], features[1:]) if is_patch else (None, features)
        steps.append(ours(id_11, image_features=mine, cache=cache))
    assert not len(features)
    assert relative_error(torch.cat(steps, dim=1), theirs(ids, pixel_values=pixels).logits) < 1e-5
