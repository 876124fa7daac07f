"""Tokens to experts and their results back: the router's logits, rows sorted by expert, sums of a token's rows.

Shapes: N packed tokens, D hidden size, E experts, k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llama4.kernels.triton import common, launch_routing
from llama4.ops import gpu_kernels
from llama4.ops.linear import linear
from llama4.ops.precision import upcast


class Dispatched(NamedTuple):
    """What experts compute with.

    Attributes:
        x_RD: rows sorted by expert, those of one expert in the order of the tokens, each already multiplied by its
            score, in the dtype of the tokens.
        num_tokens_per_expert_E: int64, how many rows each expert has; they sum to R.
        tokens_R: the token that each row is of.
        rows_Nk: the rows of each token.
    """

    x_RD: Tensor
    num_tokens_per_expert_E: Tensor
    tokens_R: Tensor
    rows_Nk: Tensor


def router_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T, [N, E], in float32 or better."""
    if logits_unsupported_reason(x_ND, weight_ED) is None:
        return launch_routing.router_logits(x_ND, weight_ED)
    if half_product_unsupported_reason(x_ND, weight_ED) is None:
        return torch.mm(x_ND, weight_ED.mT, out_dtype=torch.float32)
    return linear(upcast(x_ND), upcast(weight_ED))


def logits_unsupported_reason(x_ND: Tensor, weight_ED: Tensor) -> str | None:
    """Why the Triton kernel does not take these; None if it does."""
    if len(x_ND) > launch_routing.MAX_TOP_1:
        return "so many rows are faster in a product of matrices"
    if x_ND.shape[1] > common.MAX_WIDTH:
        return f"rows are wider than {common.MAX_WIDTH}"
    return gpu_kernels.unsupported_reason(x_ND, weight_ED)


def half_product_unsupported_reason(x_ND: Tensor, weight_ED: Tensor) -> str | None:
    """Why torch does not multiply these as they are, with sums in float32; None if it does. Products of numbers of 16
    bits are exact there."""
    if x_ND.dtype != weight_ED.dtype or x_ND.dtype.itemsize != 2:
        return "rows or weights are not of one dtype of 16 bits"
    return gpu_kernels.unsupported_reason(x_ND, weight_ED)


def top_k(logits_NE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their indices, [N, k]; the lowest index on ties (torch.topk promises no
    order)."""
    if k == 1:
        values_N1, indices_N1 = logits_NE.max(dim=-1, keepdim=True)
        return values_N1, indices_N1
    values_NE, indices_NE = logits_NE.sort(dim=-1, descending=True, stable=True)
    return values_NE[:, :k], indices_NE[:, :k]


def dispatch(x_ND: Tensor, scores_Nk: Tensor, experts_Nk: Tensor, num_experts: int) -> Dispatched:
    """Tokens times their scores, sorted by expert; the host does not wait for a GPU.

    Args:
        x_ND: tokens.
        scores_Nk: of the chosen experts, in float32 or better.
        experts_Nk: their indices, int64.
        num_experts: of the layer.
    """
    if gpu_kernels.unsupported_reason(x_ND, scores_Nk) is None:
        return Dispatched(*launch_routing.dispatch(x_ND, scores_Nk, experts_Nk, num_experts))
    order_R = experts_Nk.flatten().argsort(stable=True)
    tokens_R = order_R // experts_Nk.shape[1]
    rows_Nk = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    x_RD = (x_ND[tokens_R] * scores_Nk.flatten()[order_R, None]).type_as(x_ND)
    every_E1 = torch.arange(num_experts, device=x_ND.device)[:, None]
    counts_E = (experts_Nk.flatten() == every_E1).sum(1)  # for bincount, the host would wait
    return Dispatched(x_RD, counts_E, tokens_R, rows_Nk.view_as(experts_Nk))


def dispatch_top_k(x_ND: Tensor, logits_NE: Tensor, k: int) -> Dispatched:
    """Each token to the experts of its k largest logits, with their sigmoids as scores. To sort by one expert each, a
    few tokens need no more than a look at all of them."""
    few = k == 1 and len(x_ND) <= launch_routing.MAX_TOP_1
    if few and gpu_kernels.unsupported_reason(x_ND, logits_NE) is None:
        return Dispatched(*launch_routing.dispatch_top_1(x_ND, logits_NE))
    logits_Nk, experts_Nk = top_k(logits_NE, k)
    return dispatch(x_ND, logits_Nk.sigmoid(), experts_Nk, logits_NE.shape[1])


def combine(routed_RD: Tensor, rows_Nk: Tensor, out_ND: Tensor) -> Tensor:
    """out + the rows of each token, always in the same order, [N, D] in float32 or better."""
    if gpu_kernels.unsupported_reason(routed_RD, out_ND) is None:
        return launch_routing.combine(routed_RD, rows_Nk, out_ND)
    out_ND = upcast(out_ND)
    added_NkD = routed_RD.index_select(0, rows_Nk.flatten()).unflatten(0, rows_Nk.shape)
    added_ND = added_NkD.squeeze(1) if rows_Nk.shape[1] == 1 else added_NkD.sum(1, dtype=out_ND.dtype)
    return out_ND + added_ND
