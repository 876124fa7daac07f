"""What an adapter adds to a product: x A^T B^T, with two narrow matrices.

In inference on a CPU both are products of the compiled kernels, so that a row is the same bits whatever stands beside
it, as far as it is in the product that this is added to. Kernels want inputs by the dozen: a rank that is no multiple
is filled up with zeros, which change no sum.

Shapes: N rows, R rows sorted by expert, I inputs, O outputs, r rank, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.kernels import abi
from llama4.ops.experts import grouped_product, loop_over_experts
from llama4.ops.linear import linear


def low_rank(x: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """scale * x A^T B^T, [..., I] -> [..., O]."""
    x_Nr = linear(x.reshape(-1, x.shape[-1]), a_rI) * scale
    if _is_for_kernels(x) and (more := -len(a_rI) % abi.LANES):
        x_Nr, b_Or = F.pad(x_Nr, (0, more)), F.pad(b_Or, (0, more))
    return linear(x_Nr, b_Or).view(*x.shape[:-1], len(b_Or))


def low_rank_experts(
    x_RI: Tensor, num_tokens_per_expert_E: Tensor, a_ErI: Tensor, b_EOr: Tensor, scale: float
) -> Tensor:
    """The same for rows sorted by expert, [R, O], of which each expert has matrices of its own; elsewhere in two
    grouped products, whatever the number of experts."""
    if _is_for_kernels(x_RI):
        return loop_over_experts(
            lambda own_RI, expert: low_rank(own_RI, a_ErI[expert], b_EOr[expert], scale), x_RI, num_tokens_per_expert_E
        )
    x_Rr = grouped_product(x_RI, num_tokens_per_expert_E, a_ErI.mT) * scale
    return grouped_product(x_Rr, num_tokens_per_expert_E, b_EOr.mT)


def _is_for_kernels(x: Tensor) -> bool:
    return x.is_cpu and not torch.is_grad_enabled()
