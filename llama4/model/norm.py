"""The norm before attention and feed-forward, and before the head.

Shapes: D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.ops.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., D] of any dtype -> the same shape, in the dtype of the weight; computed in float32 or better. With a
        delta, x + delta in float32 or better, and the norm of that."""
        if delta is not None:
            return add_rms_norm(x, delta, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)
