"""Products with blocks of GGUF against what the package `gguf` makes of them, in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from llama4.kernels import abi, cpu
from llama4.quantization.gguf_blocks import GGUF_FORMATS
from llama4.quantization.int4_zeros import Int4Zeros
from tests.kernels.test_cpu import DTYPES, normal
from tests.marks import needs_kernels
from tests.weights.test_gguf import random_blocks, truth

pytestmark = needs_kernels

INPUTS = {32: [32, 96, 128, 576, 2080], 256: [256, 768, 2304]}
"""By the size of a block. Four blocks of 32 go together, and one to three are left."""


@cache
def matrix(kind: str, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """As it is stored, with nothing behind it, and in float64."""
    stored = random_blocks(kind, outputs, inputs, seed=outputs + inputs)
    return torch.frombuffer(bytearray(stored[2]), dtype=torch.uint8).view(outputs, -1), truth(stored).double()


def right(ours: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Within the rounding of sums, which are longer with many rows; in bfloat16 also that of the result, of inputs to
    16 bits beside Q8_0 and, with many rows, of the weights."""
    is_float32, has_many_rows = ours.dtype == torch.float32, len(x) > abi.MAX_GEMV_ROWS
    truth, size = x.double() @ weight.mT, (x.double().square() @ weight.square().mT).sqrt()
    allowed = {(True, False): 1e-6, (True, True): 2e-5, (False, False): 1e-4, (False, True): 1.5e-2}
    error = (ours.double() - truth).abs() - (0 if is_float32 else 2.0**-8 * truth.abs())
    return bool((error <= allowed[is_float32, has_many_rows] * size).all())


def product(kind: str, x: Tensor, blocks: Tensor) -> Tensor:
    return cpu.linear_quantized(GGUF_FORMATS[kind].kind, x, blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GGUF_FORMATS)
class TestProducts:
    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 12])
    def test_few_rows(self, kind: str, rows: int, dtype: torch.dtype) -> None:
        for inputs in INPUTS[GGUF_FORMATS[kind].block]:
            for outputs in (1, 16, 51, 100):
                blocks, weight = matrix(kind, outputs, inputs)
                x = normal(rows, inputs, seed=rows).to(dtype)
                assert right(product(kind, x, blocks), x, weight), (outputs, inputs)

    @pytest.mark.parametrize("rows", [13, 40, 200])
    def test_many_rows(self, kind: str, rows: int, dtype: torch.dtype) -> None:
        for inputs in INPUTS[GGUF_FORMATS[kind].block]:
            blocks, weight = matrix(kind, 96, inputs)
            x = normal(rows, inputs, seed=rows).to(dtype)
            assert right(product(kind, x, blocks), x, weight), inputs

    def test_a_row_is_the_same_bits_in_any_company(self, kind: str, dtype: torch.dtype) -> None:
        inputs = INPUTS[GGUF_FORMATS[kind].block][-1]
        blocks, _ = matrix(kind, 51, inputs)
        x = normal(12, inputs).to(dtype)
        alone = torch.cat([product(kind, row[None], blocks) for row in x])
        for rows in range(2, abi.MAX_GEMV_ROWS + 1):
            assert torch.equal(product(kind, x[-rows:], blocks), alone[-rows:]), rows

    def test_a_scale_that_is_no_number_spoils_its_own_output_alone(self, kind: str, dtype: torch.dtype) -> None:
        if kind == "MXFP4":
            pytest.skip("all of its scales are numbers")
        blocks, _ = matrix(kind, 48, 768)
        x, spoilt = normal(2, 768).to(dtype), [0, 5, 16, 47]
        wanted = product(kind, x, blocks)
        blocks = blocks.clone()
        at = 208 if kind == "Q6_K" else 0
        blocks[spoilt, at : at + 2] = torch.tensor([torch.inf], dtype=torch.float16).view(torch.uint8)
        found = product(kind, x, blocks)
        others = [i for i in range(48) if i not in spoilt]
        assert torch.equal(found[:, others], wanted[:, others])
        assert not found[:, spoilt].isfinite().any()


def on_steps(rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Rows that rounding to int8 does not change: of each 16 inputs the largest is 127 steps, and steps are powers of
    two of very different sizes, the same for two such groups. Two groups are of zeros."""
    generator = torch.Generator().manual_seed(rows * inputs)
    steps = torch.randint(-127, 128, (rows, inputs // 32, 32), generator=generator)
    steps[..., 7::16] = 127
    steps[:, -1] *= min(1, inputs // 32 - 1)
    return (steps * 2.0 ** torch.randint(-9, 9, (rows, inputs // 32, 1), generator=generator)).flatten(-2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GGUF_FORMATS)
class TestInt8Activations:
    def product(self, kind: str, x: Tensor, blocks: Tensor) -> Tensor:
        return cpu.linear_quantized(f"{GGUF_FORMATS[kind].kind}_int8", x, blocks)

    @pytest.mark.parametrize("rows", [1, 4, 7, 12, 13, 40])
    def test_products_of_integers(self, kind: str, rows: int, dtype: torch.dtype) -> None:
        for inputs in INPUTS[GGUF_FORMATS[kind].block]:
            blocks, weight = matrix(kind, 96, inputs)
            x = on_steps(rows, inputs, dtype)
            truth, size = x.double() @ weight.mT, (x.double().square() @ weight.square().mT).sqrt()
            error = (self.product(kind, x, blocks).double() - truth).abs()
            assert (error <= 4e-6 * size + (0 if dtype == torch.float32 else 2.0**-8) * truth.abs()).all(), inputs

    def test_rounding_is_to_the_nearest_step(self, kind: str, dtype: torch.dtype) -> None:
        inputs = INPUTS[GGUF_FORMATS[kind].block][-1]
        blocks, weight = matrix(kind, 96, inputs)
        for rows in (3, 20):
            x = normal(rows, inputs, seed=rows).to(dtype)
            groups = x.double().unflatten(-1, (-1, GGUF_FORMATS[kind].group_size))
            halves = groups.abs().amax(-1, keepdim=True).expand_as(groups) / 127 / 2
            truth, bound = x.double() @ weight.mT, halves.flatten(-2) @ weight.abs().mT
            error = (self.product(kind, x, blocks).double() - truth).abs()
            assert (error <= 1.001 * bound + (0 if dtype == torch.float32 else 2.0**-8) * truth.abs()).all()
            assert error.max() > bound.min() / 1000  # it is rounded

    def test_a_row_is_the_same_bits_in_any_company(self, kind: str, dtype: torch.dtype) -> None:
        inputs = INPUTS[GGUF_FORMATS[kind].block][-1]
        blocks, _ = matrix(kind, 96, inputs)
        x = normal(40, inputs).to(dtype)
        alone = torch.cat([self.product(kind, row[None], blocks) for row in x])
        for rows in range(2, abi.MAX_GEMV_ROWS + 1):
            assert torch.equal(self.product(kind, x[-rows:], blocks), alone[-rows:]), rows
        many = self.product(kind, x, blocks)
        for rows in (13, 18, 39):
            assert torch.equal(self.product(kind, x[-rows:], blocks), many[-rows:]), rows

    def test_the_largest_values_do_not_overflow(self, kind: str, dtype: torch.dtype) -> None:
        format = GGUF_FORMATS[kind]
        blocks = torch.full((32, 2 * format.nbytes), 0xFF, dtype=torch.uint8)
        one = torch.tensor([1.0, 1.0], dtype=torch.float16).view(torch.uint8)
        for at in range(0, len(blocks[0]), format.nbytes):
            begin = {"Q6_K": 208, "MXFP4": 0}.get(kind, 0)
            width = {"Q4_1": 4, "Q5_1": 4, "Q4_K": 4, "Q5_K": 4, "MXFP4": 1}.get(kind, 2)
            blocks[:, at + begin : at + begin + width] = 128 if kind == "MXFP4" else one[:width]
        weight = format.decode(blocks).double()
        for rows, sign in ((1, 1), (1, -1), (20, 1)):
            x = torch.full((rows, weight.shape[1]), 3.0 * sign, dtype=dtype)
            truth = x.double() @ weight.mT
            assert ((self.product(kind, x, blocks).double() - truth).abs() <= 2.0**-8 * truth.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*GGUF_FORMATS, "int4_zeros", "q8_0"])
@pytest.mark.parametrize("rows", [1, 20])
def test_inputs_that_are_no_numbers_are_not_rounded_away(rows: int, kind: str, dtype: torch.dtype) -> None:
    """Neither is infinity; rows beside theirs have their values."""
    inputs, generator = 768, torch.Generator().manual_seed(1)
    if kind == "int4_zeros":
        values = torch.randint(0, 16, (96, inputs), generator=generator, dtype=torch.uint8)
        zeros, scales = values[:, ::32], torch.rand(96, inputs // 32, generator=generator).half()
        blocks, name = Int4Zeros(32, torch.float16).encode(values, zeros.contiguous(), scales), "int4_zeros_int8"
    elif kind == "q8_0":  # without rounding to int8
        blocks, name = matrix("Q8_0", 96, inputs)[0], kind
    else:
        blocks, name = matrix(kind, 96, inputs)[0], f"{GGUF_FORMATS[kind].kind}_int8"
    x = normal(rows, inputs).to(dtype)
    wanted = cpu.linear_quantized(name, x, blocks)
    for at in (0, 45, 767):
        for value in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[-1, at] = value
            found = cpu.linear_quantized(name, spoilt, blocks)
            assert not found[-1].isfinite().any(), (at, value)
            assert value == value or found[-1].isnan().all()
            assert torch.equal(found[:-1], wanted[:-1])


def test_inputs_that_are_no_whole_blocks_are_refused() -> None:
    blocks, _ = matrix("Q4_K", 16, 256)
    with pytest.raises(abi.KernelArgumentError, match="odd inputs"):
        product("Q4_K", normal(1, 128), blocks)
