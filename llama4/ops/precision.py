"""The precision that sums are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
