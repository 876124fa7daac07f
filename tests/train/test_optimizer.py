"""AdamW, clipping and schedules against torch's and transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama4.train.optimizer import AdamW, Int8State, learning_rate_at, round_at_random


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


def test_8_bits_are_unbiased_to_their_rounding() -> None:
    """Each number is one of its two neighbours on a scale of 2^(1/5), and the mean of many is the number."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 1000)
    x[3], generator = 0.0, torch.Generator().manual_seed(0)
    parts, total = Int8State.new(x), torch.zeros(1000, dtype=torch.float64)
    for _ in range(400):
        Int8State.write(parts, x, generator)
        found = Int8State.read(parts, x)
        total += found
        ratio = (found / x)[x.abs() > 1e-5]
        assert ratio.min() > 2**-0.2001 and ratio.max() < 2**0.2001
    assert found[3] == 0 and parts[""].dtype == torch.int8 and len(parts["_scale"]) == 4
    large = x.abs() > 1e-2
    assert ((total / 400)[large] / x[large] - 1).abs().max() < 0.02


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
