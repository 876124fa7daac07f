"""Products with two narrow matrices against their definition, and that rows do not change each other's bits."""

from __future__ import annotations

import pytest
import torch

from llama4.kernels import abi
from llama4.ops.low_rank import low_rank, low_rank_experts
from tests.marks import needs_kernels


@pytest.mark.parametrize("rank", [1, 5, 16, 24])
@pytest.mark.parametrize("is_training", [False, True])
def test_equals_its_definition(rank: int, is_training: bool) -> None:
    generator = torch.Generator().manual_seed(rank)
    x, a = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 256), (rank, 256)))
    b, counts = torch.randn(128, rank, generator=generator), torch.tensor([5, 0, 7])
    stacked_a, stacked_b = (torch.randn(3, *each.shape, generator=generator) for each in (a, b))
    expert_R = torch.arange(3).repeat_interleave(counts)
    with torch.set_grad_enabled(is_training):
        found = low_rank(x, a, b, 0.5), low_rank_experts(x.view(12, 256), counts, stacked_a, stacked_b, 0.5)
    wanted = torch.einsum("nqi,ri,or->nqo", x, a, b) / 2
    own_a, own_b = stacked_a[expert_R], stacked_b[expert_R]
    assert (found[0] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    wanted = torch.einsum("ni,nri,nor->no", x.view(12, 256), own_a, own_b) / 2
    assert (found[1] - wanted).abs().max() < 1e-5 * wanted.abs().max()


@needs_kernels
@pytest.mark.parametrize("rank", [8, 16])
@torch.inference_mode()
def test_a_row_is_the_same_bits_in_company(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    x, a, b = (
        torch.randn(*shape, generator=generator) for shape in ((abi.MAX_GEMV_ROWS, 512), (rank, 512), (384, rank))
    )
    alone = torch.cat([low_rank(row[None], a, b, 2.0) for row in x])
    for rows in (2, 3, 7, abi.MAX_GEMV_ROWS):
        assert torch.equal(low_rank(x[:rows], a, b, 2.0), alone[:rows])
    counts, stacked_a, stacked_b = torch.tensor([0, 5, 7]), a.expand(3, -1, -1), b.expand(3, -1, -1)
    assert torch.equal(low_rank_experts(x, counts, stacked_a, stacked_b, 2.0), alone)
