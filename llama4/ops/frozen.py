"""Products with weights that are not trained: computed in any way, with a gradient for the inputs alone.

Kernels have no gradient, and torch would keep what a product in plain torch makes on its way, such as a matrix that was
dequantized. Here nothing is kept, and the gradient is computed from the weight as it is stored.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, product: Product, input_gradient: Product) -> Tensor:
        ctx.input_gradient = input_gradient
        return product(x_NI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.input_gradient(*gradients), None, None


def frozen_product(x_NI: Tensor, product: Product, input_gradient: Product) -> Tensor:
    """`product(x)`, [N, O].

    Args:
        input_gradient: the gradient of the outputs [N, O] -> that of x [N, I].
    """
    if not (torch.is_grad_enabled() and x_NI.requires_grad):
        return product(x_NI)
    out: Tensor = _FrozenProduct.apply(x_NI, product, input_gradient)
    return out
