"""In float32 what is rounded hardly grows with the length of a sum, whatever way a product goes.

So few rows and many, prompts whole and in pieces, differ by little, for models of any width. Errors are root mean
squares over those of float64's results: of 128 products in one long sum 2e-7, of 4,096 already 1.2e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llama4.kernels import cpu
from tests.marks import needs_kernels

pytestmark = needs_kernels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.mark.parametrize("inputs", [64, 704, 4096])
@pytest.mark.parametrize("rows", [1, 8, 9, 24, 41, 65, 200])
def test_products(inputs: int, rows: int) -> None:
    x_NI, weight_OI = normal(rows, inputs), normal(96, inputs, seed=1)
    values_OI = (weight_OI * 30).round().clamp(-127, 127)
    truth_NO = x_NI.double() @ weight_OI.double().mT
    assert rounded(cpu.linear(x_NI, weight_OI), truth_NO) < 3e-7
    assert rounded(cpu.linear_in_out(x_NI, weight_OI.mT.contiguous()), truth_NO) < 3e-7
    of_bytes = cpu.linear_quantized("int8", x_NI, values_OI.to(torch.int8), torch.full((96, 1), 1 / 32))
    assert rounded(of_bytes, x_NI.double() @ values_OI.double().mT / 32) < 3e-7


@pytest.mark.parametrize("C", [32, 128])
def test_attention(C: int) -> None:
    """Of a thousand keys, many queries at once and one after the other."""
    S, H, K = 1000, 4, 2
    q_NHC, k_SKC, v_SKC = normal(S, H, C), normal(S, K, C, seed=1), normal(S, K, C, seed=2)
    keys, values = (x.double().repeat_interleave(H // K, 1) for x in (k_SKC, v_SKC))
    scores_HNS = torch.einsum("nhc,shc->hns", q_NHC.double(), keys) / math.sqrt(C)
    scores_HNS.masked_fill_(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
    truth_NHC = torch.einsum("hns,shc->nhc", scores_HNS.softmax(-1), values)
    last = slice(S - 16, S)
    ours_NHC = cpu.attend_causal(q_NHC, k_SKC, v_SKC, None, 0, "unquantized")
    assert rounded(ours_NHC[last], truth_NHC[last]) < 4e-7

    blocks = torch.zeros(4, 2, K, 256, C)
    for block, k, v in zip(blocks, k_SKC.split(256), v_SKC.split(256), strict=True):
        block[0, :, : len(k)], block[1, :, : len(v)] = k.transpose(0, 1), v.transpose(0, 1)
    table = torch.tensor([[block.data_ptr() for block in blocks]] * 16)
    ours_BHC = cpu.attend(q_NHC[last], table, torch.arange(S - 16, S) + 1, K, "unquantized")
    assert rounded(ours_BHC, truth_NHC[last]) < 2.8e-7
