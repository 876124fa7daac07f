"""The precision that sums are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def not_zero(scale: Tensor) -> Tensor:
    """1 in place of 0, so that the quantized values of a group of zeros are zero and not NaN. The scale is rounded
    already, which may have made it 0."""
    return torch.where(scale == 0, 1.0, scale)
