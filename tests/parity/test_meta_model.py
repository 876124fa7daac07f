"""Against Meta's own code: where it is right, and where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4 import Llama4
from llama4.model.multimodal import Llama4Model
from llama4.weights.convert import convert
from tests.parity.meta_model import MetaModel
from tests.parity.references import CHUNK, PATCH, relative_error
from tests.weights.test_meta import make_reference, params, write_meta

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[False, True], ids=["scout", "maverick"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama4Model, MetaModel]:
    directory: Path = tmp_path_factory.mktemp("meta")
    content: dict[str, Any] = params(request.param)
    write_meta(directory, make_reference(request.param), content, 1)
    return Llama4.from_pretrained(directory).model, MetaModel(directory, content)


def random_ids(columns: int) -> Tensor:
    return torch.randint(0, 400, (1, columns), generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
def test_prefill_across_chunk_borders(pair: tuple[Llama4Model, MetaModel]) -> None:
    ours, theirs = pair
    ids = random_ids(3 * CHUNK + 5)
    assert relative_error(ours(ids), theirs(ids)) < TOLERANCE


@torch.inference_mode()
def test_images(pair: tuple[Llama4Model, MetaModel]) -> None:
    ours, theirs = pair
    ids, tiles = random_ids(70), torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    ids[0, 20:32] = PATCH
    assert relative_error(ours(ids, pixel_values=tiles), theirs(ids, 0, tiles, PATCH)) < TOLERANCE


@torch.inference_mode()
def test_metas_decoding_forgets_chunk_borders(pair: tuple[Llama4Model, MetaModel]) -> None:
    """Token by token, Meta's code masks nothing: right up to the first border, wrong after it. Its prefill, ours and
    transformers' agree with each other, and our decoding with them."""
    ours, theirs = pair
    ids = random_ids(CHUNK + 20)
    truth = theirs(ids)[0]
    cache = ours.new_cache()
    our_steps = torch.cat([ours(ids[:, t : t + 1], cache=cache) for t in range(ids.shape[1])], dim=1)[0]
    their_steps = torch.cat([theirs(ids[:, t : t + 1], t) for t in range(ids.shape[1])], dim=1)[0]
    assert relative_error(our_steps, truth) < TOLERANCE
    assert relative_error(their_steps[:CHUNK], truth[:CHUNK]) < TOLERANCE
    assert relative_error(their_steps[CHUNK + 1 :], truth[CHUNK + 1 :]) > 0.01


@torch.inference_mode()
def test_meta_reads_what_we_write(tmp_path: Path) -> None:
    reference = make_reference(True)
    reference.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    ids = random_ids(50)
    assert relative_error(MetaModel(tmp_path / "meta", params(True))(ids), reference(ids).logits) < TOLERANCE
