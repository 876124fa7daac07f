"""Products with int4 that has zero points, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama4.kernels import cpu
from llama4.quantization.int4_zeros import Int4Zeros
from tests.kernels.test_cpu import DTYPES, normal
from tests.kernels.test_gguf_blocks import right
from tests.marks import needs_kernels

pytestmark = needs_kernels


def matrix(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Blocks, and the numbers that they stand for."""
    generator = torch.Generator().manual_seed(inputs)
    values, zeros = (
        torch.randint(0, 16, (outputs, count), generator=generator, dtype=torch.uint8)
        for count in (inputs, inputs // group)
    )
    scales = (torch.rand(outputs, inputs // group, generator=generator) * 0.1 + 1e-4).to(dtype)
    numbers = (values.double().unflatten(1, (-1, group)) - zeros.double()[..., None]) * scales.double()[..., None]
    return Int4Zeros(group, dtype).encode(values, zeros, scales), numbers.flatten(1)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 13])
def test_products(rows: int, dtype: torch.dtype, scales: torch.dtype) -> None:
    for outputs, inputs, group in ((32, 32, 32), (96, 96, 32), (64, 576, 64), (96, 768, 128)):
        blocks, weight = matrix(outputs, inputs, group, scales)
        x = normal(rows, inputs, seed=rows).to(dtype)
        assert right(cpu.linear_quantized("int4_zeros", x, blocks), x, weight), inputs


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
def test_no_weight_is_rounded(scales: torch.dtype) -> None:
    blocks, weight = matrix(12, 256, 128, scales)
    format = Int4Zeros(128, scales)
    assert torch.equal(format.decode(blocks).double(), weight)
    parts = format.to_compressed_parts(blocks)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == format.compressed_specs((12, 256))
