"""Mixture of experts: route, dispatch, compute, combine.

Shapes: N tokens, D hidden size, E experts, K experts per token, R = N * K routed rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.config import TextConfig
from llama4.model.experts import Experts
from llama4.model.feed_forward import FeedForward
from llama4.ops.precision import upcast


def top_k(logits_NE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their indices, [N, k]; of equals the lowest index first (torch.topk promises no
    order)."""
    if k == 1:
        values, indices = logits_NE.max(dim=-1, keepdim=True)
        return values, indices
    values, indices = logits_NE.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


class Router(nn.Linear):
    """Chooses the experts of each token: logits = x W^T, the top k, score = sigmoid(logit), not renormalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.hidden_size, config.num_local_experts, bias=False)
        self.k = config.num_experts_per_tok

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """-> scores [N, K] and expert indices [N, K]. Computed in float32 or better: rounded logits tie, and a wrong
        expert costs more than all other rounding."""
        logits, experts_NK = top_k(F.linear(upcast(x_ND), upcast(self.weight)), self.k)
        return torch.sigmoid(logits), experts_NK


class MixtureOfExperts(nn.Module):
    """shared_expert(x) + the sum over a token's chosen experts of expert(score * x).

    The score multiplies the INPUT of the expert; SwiGLU is not linear, so that is another model than one that scales
    the output.
    """

    def __init__(self, config: TextConfig, experts: type[Experts]) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = experts(config)
        self.shared_expert = FeedForward(config.hidden_size, config.intermediate_size)
        self.num_experts = config.num_local_experts

    def forward(self, x_ND: Tensor) -> Tensor:
        scores_NK, experts_NK = self.router(x_ND)
        order_R = experts_NK.flatten().argsort(stable=True)
        tokens_R = order_R // experts_NK.shape[1]
        every_E1 = torch.arange(self.num_experts, device=x_ND.device)[:, None]
        counts_E = (experts_NK.flatten() == every_E1).sum(1)  # the host would wait for bincount on a GPU
        scaled_RD = (x_ND[tokens_R] * scores_NK.flatten()[order_R, None]).type_as(x_ND)
        routed_RD = self.experts(scaled_RD, counts_E)
        out_ND = upcast(self.shared_expert(x_ND))
        return out_ND.index_add(0, tokens_R, routed_RD.to(out_ND.dtype))
