"""AdamW, clipping and schedules against torch's and transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama4.train.optimizer import RUN, AdamW, Int8State, UInt8State, learning_rate_at, round_at_random


def test_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamW(dict(ours.named_parameters()), weight_decay=0.1)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups)
    for step in range(30):
        x, rate = torch.randn(8, 5), 0.1 / (step + 1)
        for model in (ours, theirs):
            model(x).pow(3).mean().backward()
        norm = optimizer.clip(0.05)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)), rel=1e-6)
        for group in reference.param_groups:
            group["lr"] = rate
        optimizer.step(rate)
        reference.step()
        reference.zero_grad()
        assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
        assert torch.allclose(ours.bias, theirs.bias, atol=1e-6)


def test_bfloat16_keeps_small_steps() -> None:
    """A step of a thousandth of a unit in the last place, taken a thousand times, is about one."""
    parameter = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = AdamW({"p": parameter})
    unit = 2.0**-8  # below 1, where steps go
    for _ in range(500):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(unit / 1000)
    assert parameter.float().mean().item() == pytest.approx(1 - unit / 2, abs=unit / 20)
    assert optimizer.state["p.mean"].dtype == torch.float32


def test_rounding_is_to_neighbours() -> None:
    x = torch.tensor([1.0, 1.001, -3.3, 0.0, float("inf"), float("nan")]).repeat(1000, 1)
    rounded = round_at_random(x, torch.bfloat16, torch.Generator().manual_seed(0)).float()
    assert torch.equal(rounded[:, [0, 3, 4]], x[:, [0, 3, 4]]) and rounded[:, 5].isnan().all()
    assert len(rounded[:, 1].unique()) == 2 and float(rounded[:, 1].mean()) == pytest.approx(1.001, abs=5e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    for step in range(20):
        wanted = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(step, 20, 0.3, schedule, 4) == pytest.approx(wanted, abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("kind", [Int8State, UInt8State])
def test_8_bits_are_unbiased_to_their_rounding(kind: type[Int8State]) -> None:
    """Each number is one of its two neighbours on a scale of 2^(1/5), and the mean of many is the number."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 1000)
    x = x if kind is Int8State else x.abs()
    x[3], generator = 0.0, torch.Generator().manual_seed(0)
    parts, total, run = kind.new(x), torch.zeros(1000, dtype=torch.float64), slice(0, 1000)
    for _ in range(400):
        kind.write(parts, run, x, generator)
        found = kind.read(parts, run)
        total += found
        ratio = (found / x)[x.abs() > 1e-5]
        assert ratio.min() > 2**-0.2001 and ratio.max() < 2**0.2001
    assert found[3] == pytest.approx(0.0, abs=1e-14) and parts[""].dtype == kind.dtype and len(parts["_scale"]) == 4
    large = x.abs() > 1e-2
    assert ((total / 400)[large] / x[large] - 1).abs().max() < 0.02


def test_8_bit_steps_are_never_far() -> None:
    """Gradients of six decades in one block, most of them now and then zero: Adam's steps are about the learning rate,
    and rounding must not make them many times that."""
    generator = torch.Generator().manual_seed(0)
    parameter, scales = nn.Parameter(torch.zeros(4096)), torch.logspace(-6, 0, 256).repeat(16)
    optimizer, largest = AdamW({"p": parameter}, states="int8"), 0.0
    for step in range(60):
        before = parameter.detach().clone()
        here = torch.rand(4096, generator=generator) < (1.0 if step % 10 == 0 else 0.3)
        parameter.grad = scales * torch.randn(4096, generator=generator) * here
        optimizer.step(1.0)
        largest = max(largest, (parameter.detach() - before).abs().max().item())
    assert 0.9 < largest < 3


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_a_step_in_runs_is_a_step(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a parameter of several runs, contiguous or not."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(70, 30, generator=generator) for _ in range(2))
    ends = []
    for run in (RUN, 256):
        monkeypatch.setattr("llama4.train.optimizer.RUN", run)
        parameters = {"a": nn.Parameter(start.clone()), "b": nn.Parameter(start.mT.contiguous().mT)}
        optimizer = AdamW(parameters, weight_decay=0.1, states=states)
        for parameter in parameters.values():
            parameter.grad = gradient.clone()
        optimizer.step(0.1)
        ends += [parameter.detach() for parameter in parameters.values()]
    assert not ends[1].is_contiguous() and (ends[0] - start).abs().min() > 0.05
    assert all(torch.equal(end, ends[0]) for end in ends[1:])


def test_8_bit_adam_goes_where_adam_goes() -> None:
    """On a quadratic of unlike curvatures with noisy gradients: the same way within the rounding, the same end."""
    torch.manual_seed(0)
    curvature, start = torch.logspace(-1, 1, 600), torch.randn(600)
    ends = []
    for states in ("float32", "int8"):
        parameter, generator = nn.Parameter(start.clone()), torch.Generator().manual_seed(3)
        optimizer = AdamW({"p": parameter}, states=states)
        for step in range(300):
            parameter.grad = curvature * parameter.detach() + 0.1 * torch.randn(600, generator=generator)
            optimizer.step(0.02 * (1 - step / 300))
            if step == 0:
                first = parameter.detach().clone()
        ends.append((first, parameter.detach().clone(), optimizer.num_bytes()))
    (first, wide, wide_bytes), (other, narrow, narrow_bytes) = ends
    assert torch.equal(first, other)
    assert (narrow - wide).norm() < 0.02 * start.norm() and wide.norm() < 0.2 * start.norm()
    assert narrow_bytes < 0.26 * wide_bytes
