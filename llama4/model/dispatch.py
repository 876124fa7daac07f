"""Tokens to the experts that were chosen for them, and their results back.

Experts compute with rows sorted by expert. A dispatcher sorts the tokens, and returns the results to their places. Here
all experts are on one device. For expert parallelism, a subclass exchanges rows between devices after sorting, and
exchanges them back before adding up.

Shapes: N packed tokens, D hidden size, E experts, k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

from torch import Tensor

from llama4.ops import routing
from llama4.ops.routing import Dispatched


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
        return routing.dispatch(x_ND, scores_Nk, experts_Nk, self.num_experts)

    def combine(self, routed_RD: Tensor, dispatched: Dispatched, out_ND: Tensor) -> Tensor:
        """Add what the experts returned to `out_ND`, the output of the shared expert, each row to its token.

        Returns:
            [N, D] in float32 or better; `out_ND` is not changed.
        """
        return routing.combine(routed_RD, dispatched.rows_Nk, out_ND)
