"""Mixture of experts: route, dispatch, compute, combine.

Shapes: N packed tokens, D hidden size, E experts, k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.config import TextConfig
from llama4.model.dispatch import LocalDispatcher
from llama4.model.experts import Experts
from llama4.model.feed_forward import FeedForward
from llama4.ops.routing import router_logits, top_k


class Router(nn.Linear):
    """Chooses the experts of each token: logits = x W^T, the top k, score = sigmoid(logit), not renormalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.hidden_size, config.num_local_experts, bias=False)
        self.k = config.num_experts_per_tok

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """-> scores [N, k] and expert indices [N, k]. Computed in float32 or better: rounded logits tie, and a wrong
        expert costs more than all other rounding."""
        logits_Nk, experts_Nk = top_k(self.logits(x_ND), self.k)
        return torch.sigmoid(logits_Nk), experts_Nk

    def logits(self, x_ND: Tensor) -> Tensor:
        """[N, E], of every expert."""
        return router_logits(x_ND, self.weight)


class MixtureOfExperts(nn.Module):
    """shared_expert(x) + the sum over a token's chosen experts of expert(score * x).

    Attributes:
        dispatcher: how rows reach their experts; that of expert parallelism takes its place.
    """

    def __init__(self, config: TextConfig, experts: type[Experts]) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = experts(config)
        self.shared_expert = FeedForward(config.hidden_size, config.intermediate_size)
        self.dispatcher = LocalDispatcher(config.num_local_experts)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D] in float32 or better, as the residual stream is."""
        scores_Nk, experts_Nk = self.router(x_ND)
        routed = self.dispatcher.dispatch(x_ND, scores_Nk, experts_Nk)
        routed_RD = self.experts(routed.x_RD, routed.num_tokens_per_expert_E)
        return self.dispatcher.combine(routed_RD, routed, self.shared_expert(x_ND))
