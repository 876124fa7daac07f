"""Sampling against explicit computations in numpy and plain Python, and against transformers' processors of logits."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from llama4 import ConfigError
from llama4.config import GenerationConfig
from llama4.engine.sampling import RowState, Sampler, SamplingOptions


def drawing(seeds: Iterable[int]) -> list[RowState]:
    """A row of each seed."""
    return [RowState(random.Random(seed)) for seed in seeds]


def reference_probabilities(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float
) -> dict[int, float]:
    """Token -> probability of those that are left, in order of id; the lower id is the likelier among equals."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in sorted(kept)}


def reference_draw(probabilities: dict[int, float], uniform: float) -> int:
    mass = 0.0
    for token, probability in probabilities.items():
        mass += probability
        if uniform < mass:
            return token
    return token


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_draws_what_an_explicit_loop_draws(temperature: float, top_k: int | None, top_p: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (40, 300)).astype(np.float32)
    seeds = range(40)
    sampler = Sampler(temperature, top_p, top_k)
    ids, logprobs = sampler(torch.from_numpy(logits), drawing(seeds))
    for row, seed in enumerate(seeds):
        probabilities = reference_probabilities(logits[row], temperature, top_k, top_p)
        assert ids[row] == reference_draw(probabilities, random.Random(seed).random())
    full = logits.astype(np.float64)
    expected = full - np.log(np.exp(full).sum(axis=1, keepdims=True))  # the model's own: not tempered, not cut
    np.testing.assert_allclose(logprobs, expected[np.arange(40), ids.numpy()], atol=1e-5)


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.9), (None, 0.3), (50, 0.9), (2000, 0.5), (3, 1.0)])
def test_large_vocabularies_are_not_sorted_and_draw_the_same(scale: float, top_k: int | None, top_p: float) -> None:
    """Flat logits, of which top_p leaves thousands, and sharp ones; many of them equal."""
    logits = np.random.default_rng(2).normal(0, scale, (8, 5000)).astype(np.float32).round(2)
    sampler = Sampler(0.8, top_p, top_k)
    ids, _ = sampler(torch.from_numpy(logits), drawing(range(8)))
    for row in range(8):
        probabilities = reference_probabilities(logits[row], 0.8, top_k, top_p)
        assert ids[row] == reference_draw(probabilities, random.Random(row).random())


def processed(logits: torch.Tensor, ids: list[list[int]], sampler: Sampler) -> torch.Tensor:
    """Scores as transformers makes them of logits, after these tokens; rows are padded on the left."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    length = max(map(len, ids))
    padded = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    padding = torch.tensor([length - len(row) for row in ids])
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty, padding)])
    if sampler.temperature:
        steps += [
            TemperatureLogitsWarper(sampler.temperature),
            TopKLogitsWarper(sampler.top_k or logits.shape[1]),
            TopPLogitsWarper(sampler.top_p),
            MinPLogitsWarper(sampler.min_p),
        ]
    return steps(padded, logits.clone())  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.7])
def test_draws_from_what_transformers_leaves(top_k: int | None, top_p: float, min_p: float, penalty: float) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 2, (40, 300)).astype(np.float32))
    seen = [rng.integers(1, 300, rng.integers(1, 200)).tolist() for _ in range(40)]
    sampler = Sampler(0.9, top_p, top_k, min_p=min_p, repetition_penalty=penalty)
    ids, logprobs = sampler(logits, [RowState(random.Random(seed), row) for seed, row in enumerate(seen)])
    for row, probabilities in enumerate(processed(logits, seen, sampler).double().softmax(-1).numpy()):
        left = {i: float(p) for i, p in enumerate(probabilities) if p}
        assert ids[row] == reference_draw(left, random.Random(row).random())
    assert torch.equal(logprobs, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])  # the model's own


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_penalty_counts_what_was_chosen_before(penalty: float) -> None:
    """Greedily, and to the bit: of equal scores the lowest id."""
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    sampler = Sampler(repetition_penalty=penalty)
    seen = [list(range(1, 10 * row + 2)) for row in range(5)]
    rows = [sampler.row(list(row)) for row in seen]
    for _ in range(20):
        expected = processed(logits, seen, sampler).argmax(-1)
        ids, _ = sampler(logits, rows)
        assert torch.equal(ids, expected)
        for row, id_ in zip(seen, ids.tolist(), strict=True):
            row.append(id_)


def test_penalties_of_the_reply_and_biases_by_hand() -> None:
    """OpenAI's formula: logit - frequency * count - presence, of what the reply holds; then what is added by id. What
    the prompt holds counts for the repetition penalty alone, which comes first."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (4, 60)).astype(np.float32)
    bias = {5: 3.5, 17: -100.0, 40: 2.0}
    sampler = Sampler.from_options(
        {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "logit_bias": bias},
        GenerationConfig(),
    )
    rows = [sampler.row([1, 2, 3 + i]) for i in range(4)]
    replies: list[list[int]] = [[], [], [], []]
    for _ in range(30):
        ids, logprobs = sampler(torch.from_numpy(logits), rows)
        for i, reply in enumerate(replies):
            scores = logits[i].copy()
            for id_ in {1, 2, 3 + i, *reply}:
                scores[id_] = scores[id_] * np.float32(1.2) if scores[id_] < 0 else scores[id_] / np.float32(1.2)
            for id_ in set(reply):
                scores[id_] -= np.float32(0.4) * reply.count(id_) + np.float32(0.7)
            for id_, value in bias.items():
                scores[id_] += np.float32(value)
            assert ids[i] == scores.argmax()
            full = logits[i].astype(np.float64)
            assert abs(logprobs[i] - (full[ids[i]] - np.log(np.exp(full).sum()))) < 1e-5  # the model's own
            reply.append(int(ids[i]))
    assert all(len(set(reply)) > 1 for reply in replies)


def test_no_reply_ends_before_its_least_length() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 9.0]])
    sampler = Sampler(min_tokens=2)
    row = sampler.row(stop_ids=(3, 1))
    assert [int(sampler(logits, [row])[0]) for _ in range(4)] == [2, 2, 3, 3]


SAID = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    ("said", "options", "expected"),
    [
        ({}, {}, Sampler()),
        ({}, {"temperature": 0.7, "seed": 3}, Sampler(0.7, seed=3)),
        ({}, {"top_p": 0.5, "top_k": 3}, Sampler(0.0, 0.5, 3)),
        (SAID, {}, Sampler(0.6, 0.9, 20, min_p=0.1, repetition_penalty=1.2)),
        (SAID, {"temperature": None, "top_p": None}, Sampler(0.6, 0.9, 20, min_p=0.1, repetition_penalty=1.2)),
        (SAID, {"temperature": 0}, Sampler(0, 0.9, 20, min_p=0.1, repetition_penalty=1.2)),
        (SAID, {"temperature": 1.5, "seed": 0}, Sampler(1.5, 0.9, 20, 0, min_p=0.1, repetition_penalty=1.2)),
        (SAID, {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}, Sampler(0.6, 1.0, 20)),
        (SAID | {"do_sample": False}, {}, Sampler(repetition_penalty=1.2)),
        (SAID | {"do_sample": False}, {"temperature": 2.0}, Sampler(2.0, repetition_penalty=1.2)),
        ({"do_sample": True}, {}, Sampler(1.0, 1.0, 50)),  # as transformers reads such a file
        ({"do_sample": True, "top_k": 0}, {"top_p": 0.5}, Sampler(1.0, 0.5)),
    ],
)
def test_what_a_caller_gives_comes_before_what_the_checkpoint_says(
    said: dict[str, object], options: SamplingOptions, expected: Sampler
) -> None:
    assert Sampler.from_options(options, GenerationConfig.from_dict(said)) == expected


def test_what_the_checkpoint_asks_for_in_vain_is_refused_with_any_options() -> None:
    with pytest.raises(ConfigError, match=r"asks for num_beams = 4, typical_p = 0\.5, which"):
        Sampler.from_options({"temperature": 0}, GenerationConfig.from_dict(SAID | {"num_beams": 4, "typical_p": 0.5}))


def test_frequencies_match_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n = 20_000
    ids, _ = Sampler(0.8, top_p=0.95)(logits.expand(n, 4), drawing(range(n)))
    probabilities = reference_probabilities(logits.numpy(), 0.8, None, 0.95)
    assert set(ids.tolist()) == set(probabilities)
    for token, probability in probabilities.items():
        deviation = math.sqrt(probability * (1 - probability) / n)
        assert abs((ids == token).double().mean() - probability) < 5 * deviation  # 5 sigma: 1 in 2 million by chance


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 0.0, 5.0]])
    sampler = Sampler(top_p=0.1, top_k=3, seed=1)
    rows = [sampler.row() for _ in range(2)]
    ids, logprobs = sampler(logits, rows)
    assert ids.tolist() == [1, 0]
    assert [row.reply for row in rows] == [[1], [0]]
    assert logprobs[1] == pytest.approx(5 - math.log(2 * math.exp(5) + math.exp(-1) + 1), abs=1e-6)


def test_ties_at_the_border_of_top_k_keep_the_lowest_ids() -> None:
    ids, _ = Sampler(1.0, top_k=2)(torch.zeros(500, 9), drawing(range(500)))
    assert set(ids.tolist()) == {0, 1}


def test_a_row_draws_what_it_draws_alone() -> None:
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(1.3, seed=11)
    together, _ = sampler(logits, [sampler.row() for _ in range(5)])
    alone = [sampler(row[None], [sampler.row()])[0].item() for row in logits]
    assert together.tolist() == alone


def test_seeds_repeat_and_differ() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(1.0, seed=seed)
        rows = [sampler.row()]
        return [int(sampler(logits, rows)[0]) for _ in range(5)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [1e-300, 1e-8, 1e8])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4, float("-inf")]] * 50)
    ids, logprobs = Sampler(temperature)(logits, drawing(range(50)))
    assert torch.isfinite(logprobs).all()
    assert set(ids.tolist()) == ({0, 1, 2} if temperature > 1 else {0})


def test_half_precision_logits() -> None:
    logits = torch.randn(3, 50, dtype=torch.bfloat16)
    ids, logprobs = Sampler()(logits, drawing(range(3)))
    assert logprobs.dtype == torch.float32
    assert torch.equal(ids, logits.float().argmax(dim=-1))


@pytest.mark.parametrize(
    ("settings", "value", "remedy"),
    [
        ({"temperature": -0.5}, "-0.5", "0 (greedy) or more"),
        ({"temperature": float("nan")}, "nan", "0 (greedy) or more"),
        ({"temperature": float("inf")}, "inf", "0 (greedy) or more"),
        ({"top_p": 0.0}, "0.0", "above 0 and at most 1"),
        ({"top_p": 1.5}, "1.5", "above 0 and at most 1"),
        ({"top_p": float("nan")}, "nan", "above 0 and at most 1"),
        ({"top_k": 0}, "0", "at least 1"),
        ({"top_k": 2.5}, "2.5", "at least 1"),
        ({"min_p": -0.1}, "-0.1", "from 0"),
        ({"min_p": 1.1}, "1.1", "from 0"),
        ({"repetition_penalty": 0}, "0", "above 0"),
        ({"repetition_penalty": float("inf")}, "inf", "above 0"),
        ({"temperature": "warm"}, "'warm'", "0 (greedy) or more"),
        ({"seed": -1}, "-1", "0 or more"),
        ({"presence_penalty": 2.5}, "2.5", "from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "nan", "from -2 to 2"),
        ({"min_tokens": -1}, "-1", "0 or more"),
        ({"min_tokens": 2.5}, "2.5", "a whole number"),
        ({"seed": "a"}, "'a'", "a whole number"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], value: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"is {re.escape(value)}; .*{re.escape(remedy)}"):
        Sampler(**settings)  # type: ignore[arg-type]
