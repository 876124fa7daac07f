"""Tokens to the experts that were chosen for them, and their results back.

Experts compute with rows sorted by expert. A dispatcher sorts the tokens, and returns the results to their places. Here
all experts are on one device. For expert parallelism, a subclass exchanges rows between devices after sorting, and
exchanges them back before adding up.

Shapes: N packed tokens, D hidden size, E experts, k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.ops.precision import upcast


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What experts compute with.

    Attributes:
        x_RD: rows sorted by expert, each already multiplied by its score, in the dtype of the tokens.
        num_tokens_per_expert_E: int64, how many rows each expert has; they sum to R.
        tokens_R: the token that each row is of.
    """

    x_RD: Tensor
    num_tokens_per_expert_E: Tensor
    tokens_R: Tensor


class LocalDispatcher:
    """All experts are on this device."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_ND: Tensor, scores_Nk: Tensor, experts_Nk: Tensor) -> Dispatched:
        """Rows sorted by expert; those of one expert in the order of the tokens.

        The score multiplies the INPUT of the expert, as in Meta's code: SwiGLU is not linear, so that is another model
        than one that scales the output.

        Args:
            x_ND: tokens.
            scores_Nk: of the chosen experts, in float32 or better.
            experts_Nk: their indices, int64.
        """
        order_R = experts_Nk.flatten().argsort(stable=True)
        tokens_R = order_R // experts_Nk.shape[1]
        x_RD = (x_ND[tokens_R] * scores_Nk.flatten()[order_R, None]).type_as(x_ND)
        every_E1 = torch.arange(self.num_experts, device=x_ND.device)[:, None]
        counts_E = (experts_Nk.flatten() == every_E1).sum(1)  # for bincount, the host would wait for a GPU
        return Dispatched(x_RD, counts_E, tokens_R)

    def combine(self, routed_RD: Tensor, dispatched: Dispatched, out_ND: Tensor) -> Tensor:
        """Add what the experts returned to `out_ND`, the output of the shared expert, each row to its token.

        Returns:
            [N, D] in float32 or better; `out_ND` is not changed.
        """
        out_ND = upcast(out_ND)
        return out_ND.index_add(0, dispatched.tokens_R, routed_RD.to(out_ND.dtype))
