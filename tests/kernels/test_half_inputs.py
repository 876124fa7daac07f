"""Products of int8 with rows in bfloat16, where a CPU makes integers of 16 bits of the inputs, too, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama4.kernels import cpu
from tests.marks import needs_kernels

pytestmark = [needs_kernels, pytest.mark.parametrize("inputs", [64, 192, 640, 1024, 8192])]
"""Of which 64, 64, 128, 256 and 256 share a scale."""
OUTPUTS = 37
"""Which end within sixteen, and with one row of W that has no other to share inputs with."""
ROWS = [1, 2, 3, 4, 7, 8, 9, 16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> codes, scales, and what they stand for."""
    codes = torch.randint(-128, 128, (OUTPUTS, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scale = (normal(OUTPUTS, 1, seed=2) / 50).bfloat16()
    return codes, scale, codes.double() * scale.double()


@pytest.mark.parametrize("rows", ROWS)
def test_only_the_result_is_rounded(rows: int, inputs: int) -> None:
    codes, scale, weight = matrix(inputs)
    x = normal(rows, inputs, seed=rows).bfloat16()
    x[-1] *= 1e-30
    truth, size = x.double() @ weight.mT, (x.double().square() @ weight.square().mT).sqrt()
    error = (cpu.linear_quantized("int8", x, codes, scale).double() - truth).abs()
    assert (error <= 1e-5 * size + 2.0**-8 * truth.abs()).all()


def test_beside_a_large_input_others_lose_little(inputs: int) -> None:
    """Rounded are those that are less than 128 steps, of which the largest is 16,384 or more."""
    codes, scale, weight = matrix(inputs)
    x = normal(3, inputs).bfloat16()
    x[:, 5] = 300
    truth, bound = x.double() @ weight.mT, 300 / 2**15 * weight.abs().sum(1)
    error = (cpu.linear_quantized("int8", x, codes, scale).double() - truth).abs()
    assert (error <= bound / inputs**0.5 + 2.0**-8 * truth.abs()).all()


def test_a_row_is_the_same_bits_in_any_company(inputs: int) -> None:
    codes, scale, _ = matrix(inputs)
    x = normal(16, inputs).bfloat16()
    alone = torch.cat([cpu.linear_quantized("int8", row[None], codes, scale) for row in x])
    for rows in range(2, 13):
        assert torch.equal(cpu.linear_quantized("int8", x[-rows:], codes, scale), alone[-rows:]), rows


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_largest_values_do_not_overflow(rows: int, code: int, inputs: int) -> None:
    codes, scale, _ = matrix(inputs)
    for value in (32_767.0, -4.0, 3.99, 1e30):
        x = torch.full((rows, inputs), value, dtype=torch.bfloat16)
        small = (scale / abs(value) ** 0.5).bfloat16()
        truth = x.double() @ (code * small.double()).expand(OUTPUTS, inputs).mT
        found = cpu.linear_quantized("int8", x, torch.full_like(codes, code), small)
        assert ((found.double() - truth).abs() <= 2.0**-8 * truth.abs()).all(), value


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("largest", [2.0**-133, 2.0**-112, 255 * 2.0**100])
def test_at_the_ends_of_bfloat16(largest: float, rows: int, inputs: int) -> None:
    """Almost: sums of what is larger are infinite, as with float inputs. The scale, a power of two, is the least normal
    number where the largest input is below 2^-112."""
    codes, scale, _ = matrix(inputs)
    scale = (scale.float() * (2.0**100 if largest < 1 else 2.0**-40)).bfloat16()
    x = (largest * (2 * torch.rand(rows, inputs, generator=torch.Generator().manual_seed(3)) - 1).double()).bfloat16()
    x[:, 7] = largest
    weight = codes.double() * scale.double()
    step = max(largest / 2**14, 2.0**-126)
    truth, bound = x.double() @ weight.mT, step / 2 * weight.square().sum(1).sqrt()
    error = (cpu.linear_quantized("int8", x, codes, scale).double() - truth).abs()
    assert (error <= 4 * bound + 2.0**-8 * truth.abs()).all()


@pytest.mark.parametrize("rows", [1, 9])
def test_inputs_that_are_no_numbers_are_not_rounded_away(rows: int, inputs: int) -> None:
    codes, scale, _ = matrix(inputs)
    x = normal(rows, inputs).bfloat16()
    wanted = cpu.linear_quantized("int8", x, codes, scale)
    for at in (0, 45, inputs - 1):
        for value in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[-1, at] = value
            found = cpu.linear_quantized("int8", spoilt, codes, scale)
            assert not found[-1].isfinite().any(), (at, value)
            assert torch.equal(found[:-1], wanted[:-1])
