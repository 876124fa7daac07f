"""Tokens that the compiled kernel draws with penalties and biases, against those that torch applies."""

from __future__ import annotations

import ctypes
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama4.engine.choice import _sample
from llama4.engine.sampling import Sampler
from llama4.kernels import abi, cpu
from llama4.ops import sampling
from tests.marks import needs_kernels

V = 300


def random_sampler(rng: random.Random) -> Sampler:
    """Each setting is left out in some."""
    return Sampler(
        temperature=rng.choice((0, 0.6, 1.0, 1.8)),
        top_p=rng.choice((1.0, 0.9, 0.5)),
        top_k=rng.choice((None, 1, 7, 40, 250, 1000)),
        seed=rng.randrange(1000),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.3, 0.7)),
        presence_penalty=rng.choice((0.0, 0.7, -0.5)),
        frequency_penalty=rng.choice((0.0, 0.4, -0.2)),
        logit_bias=tuple((id_, rng.uniform(-3, 6)) for id_ in sorted(rng.sample(range(V), rng.choice((0, 4))))),
        min_tokens=rng.choice((0, 0, 3)),
    )


def request(sampler: Sampler, prompt: list[int]) -> Any:
    """As far as a choice needs one."""
    return SimpleNamespace(sampler=sampler, state=sampler.row(prompt, (3, 5)), choice=(sampler, True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(30))
def test_rows_with_settings_of_their_own_are_drawn_as_torch_would(seed: int, dtype: torch.dtype) -> None:
    """Some ids of prompts are outside the vocabulary, and logits stay, so that tokens come again and again."""
    rng, rows = random.Random(seed), 5
    samplers = [random_sampler(rng) for _ in range(rows)]
    prompts = [[rng.randrange(V + 10) for _ in range(rng.choice((1, 60)))] for _ in range(rows)]
    requests = [request(sampler, prompt) for sampler, prompt in zip(samplers, prompts, strict=True)]
    states = [sampler.row(prompt, (3, 5)) for sampler, prompt in zip(samplers, prompts, strict=True)]
    logits_BV = (2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))).to(dtype)
    for _ in range(12):
        chosen: list[Any] = list(_sample(requests, logits_BV, None))
        for row, (sampler, state) in enumerate(zip(samplers, states, strict=True)):
            (id_,), (logprob,) = sampler(logits_BV[row : row + 1], [state])
            if sampler.takes_largest:
                state.accept(int(id_))
                requests[row].state.accept(int(id_))
            assert chosen[row] == (id_, pytest.approx(float(logprob), abs=2e-6))
    assert [each.state.reply for each in requests] == [state.reply for state in states]


@needs_kernels
def test_a_row_may_go_on_by_the_other_way() -> None:
    """What the kernel and torch have seen is the same, whoever chose before."""
    sampler = Sampler(0.8, seed=4, repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=9)
    logits_BV = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    by_turns, by_torch = request(sampler, [1, 2, 3]), sampler.row([1, 2, 3], (3, 5))
    for turn in range(16):
        if turn % 3:
            _sample([by_turns], logits_BV, None)
        else:
            sampler(logits_BV, [by_turns.state])
        sampler(logits_BV, [by_torch])
    assert by_turns.state.reply == by_torch.reply


@needs_kernels
@pytest.mark.parametrize(
    "wrong", [{"seen": [V]}, {"seen": [-1]}, {"biased": [V]}, {"repetition": 0.0}, {"num_seen": -1}], ids=str
)
def test_the_kernel_refuses_penalties_that_cannot_be(wrong: dict[str, Any]) -> None:
    ids = {name: (ctypes.c_int64 * 1)(*wrong.get(name, [7])) for name in ("seen", "counts", "biased")}
    biases = (ctypes.c_double * 1)(1.0)
    arrays: list[ctypes.Array[Any]] = [*ids.values(), biases]
    penalties = abi.Penalties(*map(ctypes.addressof, arrays), wrong.get("num_seen", 1), 1)
    penalties.repetition = wrong.get("repetition", 1.1)
    draw = sampling.Draw(0, 0, 1.0, 1.0, 0.0, 0.5, ctypes.addressof(penalties))
    with pytest.raises(abi.KernelArgumentError, match="cannot be drawn"):
        cpu.draw_token(torch.zeros(1, V), [draw])


def test_penalties_are_not_dropped_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "draw_unsupported_reason", lambda logits_BV: "none was built")
    with pytest.raises(AssertionError, match="only the kernel"):
        sampling.draw_token(torch.zeros(1, V), [sampling.Draw(0, 0, 1.0, 1.0, 0.0, 0.5, penalties=8)])
