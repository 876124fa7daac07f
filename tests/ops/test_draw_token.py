"""Tokens drawn by torch and by the compiled kernel, against float64 and transformers: what is left, and how likely.

A draw takes one random number, so the whole distribution can be read off: just before the sum of probabilities passes
that of a token the token is drawn, just behind it the next.
"""

from __future__ import annotations

import math
import random
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from llama4.kernels import abi, cpu, loader
from llama4.ops import sampling
from llama4.ops.sampling import Draw, draw_token
from tests.marks import needs_kernels

BELOW_1 = 1 - 2**-53


@pytest.fixture(params=["torch", "torch on a GPU", pytest.param("kernel", marks=needs_kernels)], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name != "kernel":
        monkeypatch.setattr(loader, "library", lambda: None)
    if name == "torch on a GPU":
        monkeypatch.setattr(sampling, "_draw", sampling._draw_without_waiting)
    return name


class Filters(NamedTuple):
    top_k: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0


def drawn(logits_V: Tensor, filters: Filters, uniforms: list[float]) -> list[int]:
    return [id_ for id_, _ in draw_token(logits_V[None], [Draw(0, *filters, uniform) for uniform in uniforms])]


def left(logits_V: Tensor, filters: Filters) -> dict[int, float]:
    """Token -> probability of those that are left, in order of id, by an explicit loop over a sorted list."""
    logits = logits_V.double().tolist()
    weights = [math.exp((logit - max(logits)) / filters.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: filters.top_k or None]
    total, mass, kept = math.fsum(weights[i] for i in order), 0.0, []
    for i in order:
        if filters.top_p < 1 and mass >= filters.top_p * total:
            break
        mass += weights[i]
        if weights[i] >= filters.min_p:
            kept.append(i)
    total = math.fsum(weights[i] for i in kept)
    return {i: weights[i] / total for i in sorted(kept) if weights[i]}


def check_distribution(logits_V: Tensor, filters: Filters, expected: dict[int, float], margin: float) -> None:
    """Every token that is expected, and no other, between its own border and the last one's, to this margin."""
    ends = np.cumsum([*expected.values()])
    begins = np.concatenate([[0.0], ends[:-1]])
    assert min(expected.values()) > 2 * margin
    first = drawn(logits_V, filters, (begins + margin).tolist())
    last = drawn(logits_V, filters, np.minimum(ends - margin, BELOW_1).tolist())
    assert first == last == [*expected]


FILTERS = [
    Filters(),
    Filters(temperature=0.3),
    Filters(temperature=2.5),
    Filters(top_k=1),
    Filters(top_k=7),
    Filters(top_k=10_000),
    Filters(top_p=0.9),
    Filters(top_p=0.3),
    Filters(top_p=1e-6),
    Filters(temperature=0.7, top_p=0.95),
    Filters(min_p=0.02),
    Filters(min_p=1.0),
    Filters(top_k=40, temperature=0.8, top_p=0.9, min_p=0.01),
    Filters(top_k=900, temperature=1.5, top_p=0.99),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 15, 64, 1100])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_distribution_is_that_of_float64(filters: Filters, vocabulary: int, dtype: torch.dtype) -> None:
    """Some logits are equal, in bfloat16 many."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)).clamp(-2, 2).to(dtype)
    check_distribution(logits, filters, left(logits, filters), 1e-10)


@pytest.mark.parametrize("top_k", [0, 25])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_distribution_is_that_of_transformers(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    """Its filters compute in float32, so sums of their probabilities are right to some 1e-7."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 0.7 * torch.randn(200, generator=torch.Generator().manual_seed(5))
    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k or 200),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0]  # type: ignore[arg-type]
    expected = {i: p for i, p in enumerate(scores.double().softmax(-1).tolist()) if p}
    check_distribution(logits, Filters(top_k, temperature, top_p, min_p), expected, 1e-6)


def test_of_equals_the_first_are_left() -> None:
    """All that float32 tells of 1,000 equal tokens is exact."""
    logits, uniforms = torch.zeros(1000), [(i + 0.5) / 3000 for i in range(3000)]
    assert {*drawn(logits, Filters(top_k=7), uniforms)} == {*range(7)}
    assert {*drawn(logits, Filters(top_p=0.3), uniforms)} == {*range(300)}
    assert {*drawn(logits, Filters(top_k=500, top_p=0.5), uniforms)} == {*range(250)}
    logits[::2] = -0.5
    assert {*drawn(logits, Filters(top_k=7), uniforms)} == {*range(1, 14, 2)}
    logits[990:] = 2
    assert {*drawn(logits, Filters(top_k=17), uniforms)} == {*range(1, 14, 2), *range(990, 1000)}


@pytest.mark.parametrize("temperature", [sys.float_info.min, 5e-324, 1e-300, 1e-8])
@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=3), Filters(top_p=0.5), Filters(min_p=0.5)], ids=str)
def test_a_tiny_temperature_takes_the_largest(temperature: float, filters: Filters) -> None:
    logits = torch.tensor([-3.0, 1e4, 9999.0, -torch.inf, -1e30])
    assert {*drawn(logits, filters._replace(temperature=temperature), [0.0, 0.5, BELOW_1])} == {1}


@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=100), Filters(top_p=0.99), Filters(temperature=1e8)])
@pytest.mark.parametrize("allowed", [[0], [99], [3, 70, 71]])
def test_what_is_forbidden_is_never_drawn(filters: Filters, allowed: list[int]) -> None:
    """As a grammar forbids it: its score is minus infinity."""
    logits = torch.full((100,), -torch.inf)
    logits[allowed] = torch.tensor([1.0, 0.5, 0.7])[: len(allowed)]
    ids = drawn(logits, filters, [0.0, 1e-300, *(i / 50 for i in range(50)), BELOW_1])
    assert {*ids} == {*allowed}


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=5), Filters(top_p=0.5)], ids=str)
def test_what_is_no_number_shows(strange: float, filters: Filters) -> None:
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    logits[0, 40] = strange
    (id_, logprob), (_, other) = draw_token(logits, [Draw(0, *filters, 0.5), Draw(1, *filters, 0.5)])
    assert math.isnan(logprob)
    assert 0 <= id_ < 100
    assert not math.isnan(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_drawn_as_each_alone(dtype: torch.dtype) -> None:
    """Each with filters of its own, in any order, some rows more than once and some not at all. Of each the
    log-probability is that of the model, whatever the filters."""
    rng = random.Random(4)
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(2)).to(dtype)
    draws = [Draw(rng.choice((0, 2, 3, 5)), *rng.choice(FILTERS), rng.random()) for _ in range(60)]
    together = draw_token(logits, draws)
    for draw, (id_, logprob) in zip(draws, together, strict=True):
        own = logits[draw.row]
        assert [(id_, logprob)] == draw_token(own[None].clone(), [draw._replace(row=0)])
        assert id_ in left(own, Filters(*draw[1:5]))
        assert logprob == pytest.approx(own.double().log_softmax(-1)[id_].item(), abs=2e-6)


@pytest.mark.parametrize("way", ["torch on a GPU"], indirect=True)
@pytest.mark.parametrize("count", [1, 2, 64, 1000, 1025])
def test_sums_of_a_row_are_its_own(count: int) -> None:
    """To the bit, whatever rows are beside it; they stay where a weight is 0, and never fall."""
    weights_BV = torch.rand(5, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) ** 9
    weights_BV[:, ::3] = 0
    given_BV = weights_BV.clone()
    sums_BV = sampling._running_sum(weights_BV)
    assert weights_BV.equal(given_BV)
    assert torch.allclose(sums_BV, weights_BV.cumsum(1), rtol=1e-13, atol=0)
    for row, own_V in enumerate(weights_BV):
        assert sums_BV[row].equal(sampling._running_sum(own_V[None])[0])
    steps_BV = sums_BV.diff(dim=1)
    assert (steps_BV >= 0).all()
    assert not steps_BV[weights_BV[:, 1:] == 0].any()


def test_frequencies_are_probabilities() -> None:
    """Pearson's chi-square of 20,000 draws with a fixed seed: with k degrees of freedom it is k, give or take the
    square root of 2 k."""
    logits = 2 * torch.randn(400, generator=torch.Generator().manual_seed(7))
    filters, rng, count = Filters(top_k=60, temperature=0.9, top_p=0.97), random.Random(3), 20_000
    expected = left(logits, filters)
    ids = drawn(logits, filters, [rng.random() for _ in range(count)])
    found = np.bincount(ids, minlength=400)
    assert found.sum() == found[[*expected]].sum()
    chi_square = sum((found[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert freedom > 20
    assert abs(chi_square - freedom) < 3 * math.sqrt(2 * freedom)


def test_gradients_are_not_in_the_way() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(0, *Filters(), i / 10) for i in range(10)]
    assert draw_token(logits.clone().requires_grad_(), draws) == draw_token(logits, draws)


@needs_kernels
@pytest.mark.parametrize("way", ["kernel"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_both_ways_draw_the_same(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same random numbers, of a vocabulary as large as Llama 4's; flat, so that top_p leaves many, and not."""
    rng = random.Random(1)
    logits = (scale * torch.randn(2, 202_048, generator=torch.Generator().manual_seed(1))).to(dtype)
    filters = [
        *FILTERS,
        Filters(top_k=2000, top_p=0.9),
        Filters(top_k=20_000, top_p=0.999),
        Filters(top_k=150_000),
        Filters(temperature=0.6, top_p=0.999, min_p=1e-5),
    ]
    draws = [Draw(row, *each, rng.random()) for each in filters for row in (0, 1)]
    ours = draw_token(logits, draws)
    monkeypatch.setattr(loader, "library", lambda: None)
    theirs = draw_token(logits, draws)
    assert [id_ for id_, _ in ours] == [id_ for id_, _ in theirs]
    truth = logits.double().log_softmax(-1)
    assert [logprob for _, logprob in ours] == pytest.approx(
        [truth[draw.row, id_].item() for draw, (id_, _) in zip(draws, ours, strict=True)], abs=2e-6
    )


@needs_kernels
@pytest.mark.parametrize("way", ["kernel"], indirect=True)
@pytest.mark.parametrize(
    "wrong",
    [
        *({"row": row} for row in (-1, 2)),
        *({"temperature": temperature} for temperature in (0.0, -1.0, math.nan)),
        *({"top_p": top_p} for top_p in (0.0, 1.1, math.nan)),
        *({"min_p": min_p} for min_p in (-0.1, 1.1)),
        *({"uniform": uniform} for uniform in (-0.1, 1.0)),
        {"top_k": -1},
    ],
    ids=str,
)
def test_the_kernel_refuses_what_cannot_be(wrong: dict[str, float]) -> None:
    good = Draw(0, *Filters(), 0.5)
    with pytest.raises(abi.KernelArgumentError, match="cannot be drawn"):
        cpu.draw_token(torch.zeros(2, 16), [good, good._replace(**wrong)])  # type: ignore[arg-type]
