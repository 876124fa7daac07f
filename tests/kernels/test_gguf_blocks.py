"""Products with blocks of GGUF against what the package `gguf` makes of them, in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from llama4.kernels import abi, cpu, loader
from llama4.quantization.gguf_blocks import GGUF_FORMATS
from tests.kernels.test_cpu import DTYPES, normal
from tests.weights.test_gguf import random_blocks, truth

pytestmark = pytest.mark.skipif(loader.library() is None, reason="the kernels are not built here")

INPUTS = {32: [32, 96, 128, 576, 2080], 256: [256, 768, 2304]}
"""By the size of a block. Four blocks of 32 go together, and one to three are left."""


@cache
def matrix(kind: str, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """As it is stored, with nothing behind it, and in float64."""
    stored = random_blocks(kind, outputs, inputs, seed=outputs + inputs)
    return torch.frombuffer(bytearray(stored[2]), dtype=torch.uint8).view(outputs, -1), truth(stored).double()


def right(ours: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Within the rounding of sums, which are longer with many rows; in bfloat16 also that of the result and, with many
    rows, of the weights."""
    is_float32, has_many_rows = ours.dtype == torch.float32, len(x) > abi.MAX_GEMV_ROWS
    truth, size = x.double() @ weight.mT, (x.double().square() @ weight.square().mT).sqrt()
    allowed = {(True, False): 1e-6, (True, True): 2e-5, (False, False): 1e-5, (False, True): 1.5e-2}
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


def test_inputs_that_are_no_whole_blocks_are_refused() -> None:
    blocks, _ = matrix("Q4_K", 16, 256)
    with pytest.raises(abi.ArgumentError, match="odd inputs"):
        product("Q4_K", normal(1, 128), blocks)
