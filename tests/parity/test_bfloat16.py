"""A model in bfloat16 is as near to itself in float64 as transformers' is, over many random models."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.model.moe import Router
from llama4.model.multimodal import Llama4Model
from tests.parity.references import ReferenceModel, reference_config, reference_model, relative_error
from tests.parity.test_precision import ours_of
from tests.parity.ways import KERNELS, TORCH, WAYS, computed_by

MODELS = int(os.environ.get("LLAMA4_EXAMPLES", "30"))
THEIRS = "transformers"


@pytest.fixture(autouse=True)
def way() -> None:
    """Every model is computed in both ways, one after the other."""


def logits_of(way: str, model: torch.nn.Module, ids: Tensor) -> Tensor:
    """In float64."""
    with nullcontext() if way == THEIRS else computed_by(way):
        output = model(ids)
    logits: Tensor = output.logits if way == THEIRS else output
    return logits.double()


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


def models(directory: Path, seed: int) -> tuple[Llama4Model, dict[str, Llama4Model | ReferenceModel], Tensor]:
    """A random model with bfloat16 weights, Scout's logic or Maverick's: ours in float64; ours, for each way, and
    transformers' in bfloat16; and token ids."""
    source = reference_model(reference_config(maverick=seed % 2 == 1), seed)
    source.bfloat16().save_pretrained(directory)
    # Not `.bfloat16()`, which would break transformers' tables.
    theirs = ReferenceModel.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 490, (1, 150), generator=torch.Generator().manual_seed(seed))
    in_bfloat16 = {TORCH: ours_of(theirs, torch.bfloat16), KERNELS: ours_of(theirs, torch.bfloat16), THEIRS: theirs}
    return ours_of(theirs, torch.float64), in_bfloat16, ids


@dataclass
class Errors:
    """Of one way to compute, over all models and tokens.

    Attributes:
        each: of every logit.
        agree: whether a token went to the expert that it goes to in float64.
        forced: largest error of a model as a part of its largest logit, where all go there.
    """

    each: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)
    forced: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, routes: list[Tensor], truth: Tensor, true_routes: list[Tensor]) -> None:
        self.each.append((logits - truth).abs().flatten())
        self.agree += [(a == b).double() for a, b in zip(routes, true_routes, strict=True)]

    def summary(self) -> tuple[float, float, float]:
        """Median and 99th percentile of errors, and the share of tokens that went to the same experts."""
        pooled = torch.cat(self.each).sort().values
        median, p99 = (pooled[int(q * (len(pooled) - 1))].item() for q in (0.5, 0.99))
        return median, p99, torch.cat(self.agree).mean().item()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Errors]:
    found = {name: Errors() for name in (TORCH, KERNELS, THEIRS)}
    with torch.inference_mode():
        for seed in range(MODELS):
            exact, in_bfloat16, ids = models(tmp_path_factory.mktemp("model"), seed)
            true_routes = routed(exact)
            truth = exact(ids)
            for name, model in in_bfloat16.items():
                routes = routed(model)
                found[name].add(logits_of(name, model, ids), routes, truth, true_routes)
                force_routes(model, true_routes)
                found[name].forced.append(relative_error(logits_of(name, model, ids), truth))
    return found


@pytest.mark.parametrize("name", WAYS)
def test_no_further_from_float64_than_transformers(name: str, errors: dict[str, Errors]) -> None:
    """Pooled over many models: the tail of the errors is made by the few tokens that went to another expert, which so
    many models tell to a tenth. Their weights are bfloat16, so the truth is the same model."""
    median, p99, agree = errors[name].summary()
    their_median, their_p99, their_agree = errors[THEIRS].summary()
    print(f"ours         median {median:.2e}, 99% {p99:.2e}, experts {agree:.2%}")
    print(f"transformers median {their_median:.2e}, 99% {their_p99:.2e}, experts {their_agree:.2%}")
    assert median < 0.85 * their_median
    assert p99 < 1.1 * their_p99
    assert 1 - agree < 1.1 * (1 - their_agree)


@pytest.mark.parametrize("name", WAYS)
def test_largest_error_with_forced_routes(name: str, errors: dict[str, Errors]) -> None:
    """Every token goes to the expert that it goes to in float64: then no error may be large.

    Largest error of a model as a part of its largest logit, measured over 160 models: at most 0.0203 (0.0187 with
    kernels), and 0.0208 for transformers. Without forced routes: 0.38 and 0.41. Model by model, ours over transformers'
    has the median 0.76 (0.74 with kernels); with a bfloat16 residual stream it would be 0.88."""
    ours, theirs = torch.tensor(errors[name].forced), torch.tensor(errors[THEIRS].forced)
    ratio, largest, their_largest = (ours / theirs).median().item(), ours.max().item(), theirs.max().item()
    print(f"largest error: ours {largest:.4f}, transformers {their_largest:.4f}; median of the ratios {ratio:.2f}")
    assert largest < 0.025
    assert ratio < 0.83
