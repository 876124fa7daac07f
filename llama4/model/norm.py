"""The norm before attention and feed-forward, and before the head.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.ops.hooks import has_global_hook, has_hook
from llama4.ops.norm import add_rms_norm, rms_norm
from llama4.ops.precision import upcast


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] of any dtype -> the same shape, in the dtype of the weight; computed in float32 or better."""
        return rms_norm(x, self.weight, self.eps)


def add_and_norm(x_ND: Tensor, delta_ND: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + delta in float32 or better, and the norm of that: at once where a call of the norm does nothing else."""
    if type(norm) is RMSNorm and not has_hook(norm) and not has_global_hook():
        return add_rms_norm(x_ND, delta_ND, norm.weight, norm.eps)
    x_ND = upcast(x_ND) + delta_ND
    return x_ND, norm(x_ND)
