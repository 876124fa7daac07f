"""Dispatch and combine against a loop over the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama4.model.dispatch import LocalDispatcher

E, D = 6, 8


def routed(tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, scores, and k different experts of each; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(10 * tokens + k)
    x_ND = torch.randn(tokens, D, generator=generator)
    scores_NE = torch.rand(tokens, E - 1, generator=generator)
    scores_Nk, experts_Nk = scores_NE.topk(k)
    return x_ND, scores_Nk, experts_Nk


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [0, 1, 2, 40])
def test_rows_are_sorted_by_expert_and_scaled_on_the_input(tokens: int, k: int) -> None:
    x_ND, scores_Nk, experts_Nk = routed(tokens, k)
    dispatched = LocalDispatcher(E).dispatch(x_ND, scores_Nk, experts_Nk)
    rows, counts, owners = [torch.empty(0, D)], [], []
    for expert in range(E):
        chosen = [(n, i) for n in range(tokens) for i in range(k) if experts_Nk[n, i] == expert]
        rows += [x_ND[n, None] * scores_Nk[n, i] for n, i in chosen]
        owners += [n for n, _ in chosen]
        counts.append(len(chosen))
    assert torch.equal(dispatched.x_RD, torch.cat(rows))
    assert dispatched.num_tokens_per_expert_E.tolist() == counts
    assert dispatched.num_tokens_per_expert_E.dtype == torch.int64
    assert dispatched.tokens_R.tolist() == owners


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_combined_are_the_sums_of_a_tokens_experts(k: int, dtype: torch.dtype) -> None:
    """Summed in float32 or better, onto what the shared expert gave, which is left as it is."""
    x_ND, scores_Nk, experts_Nk = routed(40, k)
    x_ND = x_ND.to(dtype)
    dispatcher = LocalDispatcher(E)
    dispatched = dispatcher.dispatch(x_ND, scores_Nk, experts_Nk)
    assert dispatched.x_RD.dtype == dtype
    experts_R = torch.arange(E).repeat_interleave(dispatched.num_tokens_per_expert_E)
    routed_RD = dispatched.x_RD * (2.0**experts_R)[:, None].to(dtype)  # expert e multiplies by 2^e
    shared_ND = x_ND.clone()
    out_ND = dispatcher.combine(routed_RD, dispatched, shared_ND)
    assert out_ND.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(shared_ND, x_ND)
    scaled_NkD = (x_ND[:, None] * scores_Nk[..., None]).to(dtype).double()
    truth_ND = x_ND.double() + (scaled_NkD * 2.0 ** experts_Nk[..., None]).sum(1)
    assert torch.allclose(out_ND.double(), truth_ND, rtol=1e-6, atol=1e-5)
