"""Linears of a tower, whose product whoever computes with it may replace by a faster one."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [..., I], W [O, I], bias [O] -> x W^T + bias, [..., O]."""


class TowerLinear(nn.Linear):
    """torch's.

    Attributes:
        product: torch's, or a faster way that gives the same up to rounding.
    """

    product: Product = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def set_product(module: nn.Module, product: Product) -> None:
    """Of all Linears of a tower, or of a part of it."""
    for each in module.modules():
        if isinstance(each, TowerLinear):
            each.product = product
