"""Launches the kernels of `routing`. As with `launch_elementwise`, `llama4.ops` is what to call.

Where tokens are dispatched, the result is that of `ops.routing.Dispatched`: tokens times scores, sorted by expert,
[R, D]; rows of each expert [E]; the token of each row [R]; the rows of each token [N, k].

Shapes: N tokens, D hidden size, E experts, k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.kernels.triton import common

MAX_TOP_1 = 64
"""Most tokens of which each program of `dispatch_top_1` looks at all."""
SMALL_BLOCK = 64
"""Choices that a program of `sort_by_expert` looks at at once, if there are no more."""


def router_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32, [N, E], for few tokens: the weights are read for each of them."""
    from llama4.kernels.triton import routing

    x_ND, weight_ED = x_ND.contiguous(), weight_ED.contiguous()
    (N, D), E = x_ND.shape, len(weight_ED)
    logits_NE = x_ND.new_empty(N, E, dtype=torch.float32)
    common.launch(routing.router_logits, (N, E), x_ND, x_ND, weight_ED, logits_NE, E=E, D=D, **common.whole_row(D))
    return logits_NE


def dispatch(
    x_ND: Tensor, scores_Nk: Tensor, experts_Nk: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens to the experts chosen for them, int64."""
    from llama4.kernels.triton import routing

    x_ND, scores_Nk, experts_Nk = x_ND.contiguous(), scores_Nk.contiguous(), experts_Nk.contiguous()
    (N, k), D = experts_Nk.shape, x_ND.shape[1]
    x_RD, counts_E, tokens_R, rows_Nk = dispatched = _empty_dispatched(x_ND, N, k, num_experts)
    numbers = experts_Nk, tokens_R, rows_Nk, counts_E, N * k
    block = SMALL_BLOCK if N * k <= SMALL_BLOCK else common.BLOCK
    common.launch(routing.sort_by_expert, (num_experts,), x_ND, *numbers, k=k, BLOCK=block)
    tensors = x_ND, scores_Nk, rows_Nk, x_RD
    common.launch(routing.scatter_scaled, (N * k, -(-D // common.BLOCK)), x_ND, *tensors, D, k=k, BLOCK=common.BLOCK)
    return dispatched


def dispatch_top_1(x_ND: Tensor, logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At most `MAX_TOP_1` tokens to the expert of the largest logit, the first on ties, with its sigmoid as the
    score."""
    from llama4.kernels.triton import routing

    x_ND, logits_NE = x_ND.contiguous(), logits_NE.contiguous()
    (N, D), E = x_ND.shape, logits_NE.shape[1]
    x_RD, counts_E, tokens_R, rows_N1 = dispatched = _empty_dispatched(x_ND, N, 1, E)
    if not N:
        counts_E.zero_()
        return dispatched
    block_n, block_e = common.next_power_of_two(N), common.next_power_of_two(E)
    sizes = {"E": E, "BLOCK_N": block_n, "BLOCK_E": block_e, "BLOCK": common.BLOCK}
    tensors = x_ND, logits_NE, x_RD, counts_E, tokens_R, rows_N1
    common.launch(routing.dispatch_top_1, (N, -(-D // common.BLOCK)), x_ND, *tensors, N, D, **sizes)
    return dispatched


def combine(routed_RD: Tensor, rows_Nk: Tensor, out_ND: Tensor) -> Tensor:
    """out + the rows of each token, in float32, [N, D]."""
    from llama4.kernels.triton import routing

    routed_RD, rows_Nk, out_ND = routed_RD.contiguous(), rows_Nk.contiguous(), out_ND.contiguous()
    (N, k), D = rows_Nk.shape, out_ND.shape[1]
    sum_ND = out_ND.new_empty(N, D, dtype=torch.float32)
    tensors = routed_RD, rows_Nk, out_ND, sum_ND
    common.launch(routing.combine, (N, -(-D // common.BLOCK)), out_ND, *tensors, D, k=k, BLOCK=common.BLOCK)
    return sum_ND


def _empty_dispatched(x_ND: Tensor, N: int, k: int, E: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_RD, counts_E = x_ND.new_empty(N * k, x_ND.shape[1]), x_ND.new_empty(E, dtype=torch.int64)
    return x_RD, counts_E, x_ND.new_empty(N * k, dtype=torch.int64), x_ND.new_empty(N, k, dtype=torch.int64)
