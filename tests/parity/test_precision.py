"""Long positions and bfloat16, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama4.config import Llama4Config
from llama4.model.experts import GroupedExperts
from llama4.model.multimodal import Llama4Model
from tests.parity import specification
from tests.parity.references import ReferenceModel, reference_config, reference_model, relative_error

POSITIONS = [8191, 8192, 8193, 16384, 1_048_576, 10_485_759]
SCOUT: dict[str, Any] = {"attention_chunk_size": 8192, "floor_scale": 8192, "max_position_embeddings": 10_485_760}


def ours_of(theirs: ReferenceModel, dtype: torch.dtype = torch.float32) -> Llama4Model:
    model = Llama4Model(Llama4Config.from_dict(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.to(dtype).eval()


def window_around(position: int) -> range:
    """Eight positions, across the chunk's border where there is one near, within the model's window."""
    return range(min(position - 4, 10_485_752), min(position + 4, 10_485_760))


@pytest.mark.parametrize("position", POSITIONS)
@torch.inference_mode()
def test_any_position_of_ten_million(position: int) -> None:
    """Float32 sums in another order: 1e-5 of the largest logit, as near the beginning of a text. Prefilled at once, and
    token by token."""
    theirs = reference_model(reference_config(**SCOUT))
    ours, places = ours_of(theirs), window_around(position)
    ids = torch.randint(0, 490, (1, len(places)), generator=torch.Generator().manual_seed(6))
    truth = specification.run(theirs.state_dict(), ours.config, ids[0].tolist(), first_position=places[0])
    assert relative_error(ours(ids, positions=torch.tensor([places]))[0].double(), truth.logits) < 1e-5
    cache, steps = ours.new_cache(), []
    for t, place in enumerate(places):
        steps.append(ours(ids[:, t : t + 1], positions=torch.tensor([[place]]), cache=cache))
    assert relative_error(torch.cat(steps, dim=1)[0].double(), truth.logits) < 1e-5
    exact = ours.double()(ids, positions=torch.tensor([places]))[0]
    assert relative_error(exact, truth.logits) < 1e-8  # the full angle of the reference is itself good to 1e-9 only


def errors_at(position: int) -> tuple[float, float]:
    """Ours and transformers' in float32, within one chunk. Without the temperature, for which transformers takes no
    position; without scaling, so that the fastest angles are the largest."""
    config = reference_config(maverick=True, interleave_moe_layer_step=1, attn_temperature_tuning=False, **SCOUT)
    theirs = reference_model(config)
    ours, first = ours_of(theirs), min(position // 8 * 8, 10_485_752)
    ids = torch.randint(0, 490, (1, 8), generator=torch.Generator().manual_seed(7))
    places = torch.arange(first, first + 8)[None]
    truth = specification.run(theirs.state_dict(), ours.config, ids[0].tolist(), first_position=first).logits
    mine = relative_error(ours(ids, positions=places)[0].double(), truth)
    return mine, relative_error(theirs(ids, position_ids=places).logits[0].double(), truth)


@torch.inference_mode()
def test_float32_angles_of_absolute_positions_lose_it() -> None:
    """transformers rotates by the absolute position in float32, ours by the position in the chunk."""
    table = {position: errors_at(position) for position in POSITIONS}
    for position, (mine, theirs) in table.items():
        print(f"{position:>10,}   ours {mine:.1e}   transformers {theirs:.1e}")
    assert all(mine < 1e-5 for mine, _ in table.values())
    assert table[1_048_576][1] > 1e-4
    assert table[10_485_759][1] > 1e-3


@torch.inference_mode()
def test_grouped_experts_in_bfloat16_are_as_near() -> None:
    source = reference_model(reference_config(), 1)
    weights = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    config = Llama4Config.from_dict(source.config.to_dict())
    ids = torch.randint(0, 490, (1, 150), generator=torch.Generator().manual_seed(1))
    logits = []
    for experts, dtype in ((None, torch.float64), (None, torch.bfloat16), (GroupedExperts, torch.bfloat16)):
        model = Llama4Model(config, experts) if experts else Llama4Model(config)
        model.load_state_dict(weights)
        logits.append(model.to(dtype)(ids).double())
    truth, loop, grouped = logits
    assert (grouped - truth).abs().median() < 1.2 * (loop - truth).abs().median()
