"""Products of int8 and int4 with inputs that are rounded to int8, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama4.kernels import abi, cpu
from llama4.ops import quantized
from llama4.quantization.int4 import pack
from tests.marks import needs_kernels

pytestmark = needs_kernels
OUTPUTS = 96
FORMATS = [("int8", 640), ("int8", 704), ("int8", 64), ("int4", 32), ("int4", 64), ("int4", 128), ("int4", 256)]
"""Of int8 the inputs, of which 128 share a scale, or 64 where 128 do not fit; of int4 the group size."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "size"), FORMATS)
class TestInt8Inputs:
    @pytest.fixture(autouse=True)
    def make(self, kind: str, size: int) -> None:
        self.inputs, self.group = (size, 64 if size % 128 else 128) if kind == "int8" else (768, size)
        low, high = (-128, 128) if kind == "int8" else (-8, 8)
        self.set(kind, torch.randint(low, high, (OUTPUTS, self.inputs), generator=torch.Generator().manual_seed(1)))

    def set(self, kind: str, codes: Tensor) -> None:
        self.kind, self.codes = kind, codes.to(torch.int8)
        self.scale = (normal(OUTPUTS, 1 if kind == "int8" else self.inputs // self.group, seed=2) / 50).bfloat16()
        scales = self.scale.double().repeat_interleave(self.inputs // self.scale.shape[1], 1)
        self.weight = codes.double() * scales

    def product(self, x: Tensor) -> Tensor:
        if self.kind == "int8":
            return cpu.linear_quantized("int8_int8", x, self.codes, self.scale)
        packed, scale = (
            quantized.interleaved16(part, together).reshape(part.shape)
            for part, together in ((pack(self.codes), 4), (self.scale, 1))
        )
        return cpu.linear_quantized("int4_int8", x, packed, scale, self.group)

    def on_steps(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Rows that rounding does not change: the largest of a group is 127 steps, powers of two of different sizes;
        the last group is of zeros if there is another."""
        generator, groups = torch.Generator().manual_seed(rows), self.inputs // self.group
        steps = torch.randint(-127, 128, (rows, groups, self.group), generator=generator)
        steps[..., 7] = 127
        steps[:, -1] *= groups == 1
        return (steps * 2.0 ** torch.randint(-9, 9, (rows, groups, 1), generator=generator)).flatten(-2).to(dtype)

    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 12, 13, 40])
    def test_products_of_integers(self, rows: int, dtype: torch.dtype) -> None:
        x = self.on_steps(rows, dtype)
        truth, size = x.double() @ self.weight.mT, (x.double().square() @ self.weight.square().mT).sqrt()
        error = (self.product(x).double() - truth).abs()
        assert (error <= 4e-6 * size + (0 if dtype == torch.float32 else 2.0**-8) * truth.abs()).all()

    def test_rounding_is_to_the_nearest_step(self, dtype: torch.dtype) -> None:
        for rows in (3, 40):
            x = normal(rows, self.inputs, seed=rows).to(dtype)
            groups = x.double().unflatten(-1, (-1, self.group))
            halves = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2) / 127 / 2
            truth, bound = x.double() @ self.weight.mT, halves @ self.weight.abs().mT
            error = (self.product(x).double() - truth).abs()
            assert (error <= 1.001 * bound + (0 if dtype == torch.float32 else 2.0**-8) * truth.abs()).all()
            assert error.max() > bound.min() / 1000  # it is rounded

    def test_a_row_is_the_same_bits_in_any_company(self, dtype: torch.dtype) -> None:
        x = normal(40, self.inputs).to(dtype)
        alone = torch.cat([self.product(row[None]) for row in x])
        for rows in range(2, abi.MAX_GEMV_ROWS + 1):
            assert torch.equal(self.product(x[-rows:]), alone[-rows:]), rows
        many = self.product(x)
        for rows in (34, 37, 39):
            assert torch.equal(self.product(x[-rows:]), many[-rows:]), rows

    def test_the_largest_values_do_not_overflow(self, dtype: torch.dtype) -> None:
        for code in (-128, 127) if self.kind == "int8" else (-8, 7):
            self.set(self.kind, torch.full_like(self.codes, code))
            for rows, sign in ((1, 1), (1, -1), (40, 1)):
                x = torch.full((rows, self.inputs), 3.0 * sign, dtype=dtype)
                truth = x.double() @ self.weight.mT
                assert ((self.product(x).double() - truth).abs() <= 2.0**-8 * truth.abs()).all()

    @pytest.mark.parametrize("rows", [1, 40])
    def test_inputs_that_are_no_numbers_are_not_rounded_away(self, rows: int, dtype: torch.dtype) -> None:
        x = normal(rows, self.inputs).to(dtype)
        wanted = self.product(x)
        for at in (0, 45, self.inputs - 1):
            for value in (torch.nan, torch.inf, -torch.inf):
                spoilt = x.clone()
                spoilt[-1, at] = value
                found = self.product(spoilt)
                assert not found[-1].isfinite().any(), (at, value)
                assert torch.equal(found[:-1], wanted[:-1])
