"""Long positions and bfloat16, against float64."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.config import Llama4Config
from llama4.model.experts import GroupedExperts
from llama4.model.moe import Router
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


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Those of ours or of transformers, layer by layer."""
    return [m for name, m in model.named_modules() if isinstance(m, Router) or name.endswith(".router")]


def routed(model: torch.nn.Module) -> list[Tensor]:
    """Filled by every forward with the expert that each token is sent to, layer by layer."""
    chosen: list[Tensor] = []
    for module in routers(model):
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, __, output: chosen.append(output[1].flatten()))
        else:
            module.register_forward_hook(lambda _, __, output: chosen.append(output[1].float().argmax(-1).flatten()))
    return chosen


def force_routes(model: torch.nn.Module, routes: list[Tensor]) -> None:
    """Send each token to these experts, layer by layer, with the scores that the model itself gives them."""

    def ours(experts_N1: Tensor, router: Router, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> object:
        logits_NE = F.linear(inputs[0].float(), router.weight.float())
        return torch.sigmoid(logits_NE.gather(1, experts_N1)).to(output[0].dtype), experts_N1

    def theirs(experts_N1: Tensor, _: object, __: object, output: tuple[Tensor, Tensor]) -> object:
        scores_NE, logits_NE = output
        scores_N1 = torch.sigmoid(logits_NE.gather(1, experts_N1).float()).to(scores_NE.dtype)
        return torch.zeros_like(scores_NE).scatter(1, experts_N1, scores_N1), logits_NE

    for module, experts_N in zip(routers(model), routes, strict=True):
        module.register_forward_hook(partial(ours if isinstance(module, Router) else theirs, experts_N[:, None]))


def in_bfloat16(directory: Path, seed: int) -> tuple[Llama4Model, Llama4Model, ReferenceModel, Tensor]:
    """A random model with bfloat16 weights, Scout's logic or Maverick's: ours in float64, ours and
    transformers' in bfloat16; and token ids."""
    source = reference_model(reference_config(maverick=seed % 2 == 1), seed)
    source.bfloat16().save_pretrained(directory)
    # Not `.bfloat16()`, which would break transformers' tables.
    theirs = ReferenceModel.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 490, (1, 150), generator=torch.Generator().manual_seed(seed))
    return ours_of(theirs, torch.float64), ours_of(theirs, torch.bfloat16), theirs, ids


@torch.inference_mode()
def test_bfloat16_is_no_further_from_float64_than_transformers(tmp_path: Path) -> None:
    """Pooled over many models: the tail of the errors is made by the few tokens that went to another expert. Their
    weights are bfloat16, so the truth is the same model."""
    ours_all, theirs_all, ours_routes, theirs_routes = [], [], [], []
    for seed in range(int(os.environ.get("LLAMA4_EXAMPLES", "30"))):
        exact, ours, theirs, ids = in_bfloat16(tmp_path / str(seed), seed)
        truth_routes, routes, reference_routes = routed(exact), routed(ours), routed(theirs)
        truth = exact(ids)
        ours_all.append((ours(ids).double() - truth).abs().flatten())
        theirs_all.append((theirs(ids).logits.double() - truth).abs().flatten())
        ours_routes += [(a == b).double() for a, b in zip(routes, truth_routes, strict=True)]
        theirs_routes += [(a == b).double() for a, b in zip(reference_routes, truth_routes, strict=True)]
    rows = []
    for errors, routes in ((ours_all, ours_routes), (theirs_all, theirs_routes)):
        pooled = torch.cat(errors).sort().values
        median, p99 = (pooled[int(q * (len(pooled) - 1))].item() for q in (0.5, 0.99))
        rows.append((median, p99, torch.cat(routes).mean().item()))
    (median, p99, agree), (their_median, their_p99, their_agree) = rows
    print(f"ours         median {median:.2e}, 99% {p99:.2e}, experts {agree:.2%}")
    print(f"transformers median {their_median:.2e}, 99% {their_p99:.2e}, experts {their_agree:.2%}")
    assert median < 0.85 * their_median
    assert p99 < their_p99
    assert agree > their_agree


@torch.inference_mode()
def test_largest_error_of_bfloat16_with_forced_routes(tmp_path: Path) -> None:
    """Every token goes to the expert that it goes to in float64: then no error may be large.

    Largest error of a model as a part of its largest logit, measured over 160 models: at most 0.0203 (0.0187 with
    kernels), and 0.0208 for transformers. Without forced routes: 0.38 and 0.41. Model by model, ours over transformers'
    has the median 0.76 (0.74 with kernels); with a bfloat16 residual stream it would be 0.88."""
    errors = []
    for seed in range(int(os.environ.get("LLAMA4_EXAMPLES", "30"))):
        exact, ours, theirs, ids = in_bfloat16(tmp_path / str(seed), seed)
        routes = routed(exact)
        truth = exact(ids)
        force_routes(ours, routes)
        force_routes(theirs, routes)
        errors.append([relative_error(y.double(), truth) for y in (ours(ids), theirs(ids).logits)])
    ours_per_model, theirs_per_model = torch.tensor(errors).unbind(1)
    ratio = (ours_per_model / theirs_per_model).median().item()
    largest, their_largest = ours_per_model.max().item(), theirs_per_model.max().item()
    print(f"largest error: ours {largest:.4f}, transformers {their_largest:.4f}; median of the ratios {ratio:.2f}")
    assert largest < 0.025
    assert ratio < 0.83


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
