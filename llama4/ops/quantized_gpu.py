"""Products with quantized matrices on the Triton kernels of a GPU.

Shapes: R routed rows sorted by expert, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4.kernels.triton import launch_products, support
from llama4.ops import fp8


def unsupported_reason(kind: str, x: Tensor, inputs: int, group_size: int | None) -> str | None:
    """Why no kernel multiplies rows with a matrix of a format; None if one does. That the kernels do not run on a GPU
    is logged once.

    Args:
        x: the rows, or those that they will be computed from.
        inputs: of the matrix.
        group_size: how many of them share a scale, if not all do.
    """
    if not x.is_cuda:
        return "the rows are not on a GPU"
    if kind not in launch_products.KINDS:
        return f"there are no kernels for {kind}"
    if kind == "fp8" and group_size:
        return "there is more than one scale per output"
    if (group_size or inputs) % (multiple := 32 if kind == "int4" else 16):
        return f"the inputs of a scale are no multiple of {multiple}"
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    if x.requires_grad and torch.is_grad_enabled():
        return "a tensor needs a gradient"
    return support.unsupported_reason(x.device, x.dtype)


def linear(kind: str, x_RI: Tensor, values: Tensor, scale: Tensor, counts_E: Tensor | None = None) -> Tensor:
    """x W^T, [R, O], in the dtype of x, where `unsupported_reason` is None; the host does not wait for the device.

    Args:
        x_RI: rows; "fp8" rounds them to e4m3, and leaves many rows to torch, where that multiplies e4m3.
        values: [O, I] or [E, O, I]: int8, bytes of e4m3, or of "int4" [.., I / 8] int32.
        scale: [O, G] or [E, O, G].
        counts_E: rows of each expert, on the rows' device; None: there is one matrix.
    """
    if kind != "fp8":
        return launch_products.product(kind, x_RI, values, scale, counts_E)
    is_grouped = counts_E is not None
    if len(x_RI) > launch_products.MAX_GEMV_ROWS and fp8.torch_multiplies(x_RI, values, grouped=is_grouped):
        if counts_E is None:
            return fp8.scaled_mm(x_RI, values, scale)
        return fp8.scaled_grouped_mm(x_RI, values, scale, counts_E)
    x_values, x_scale = fp8.to_fp8(x_RI, torch.float32)
    x_values, x_scale_R = x_values.view(torch.uint8), x_scale.squeeze(1)
    return launch_products.product(kind, x_values, values, scale, counts_E, x_scales_R=x_scale_R, dtype=x_RI.dtype)


def linears(kind: str, x_RI: Tensor, matrices: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`linear` by up to three matrices, each values and scale, where `together_unsupported_reason` is None: views
    [R, O] of one tensor, which one launch computes."""
    outputs = [scale.shape[0] for _, scale in matrices]
    if kind != "fp8":
        return list(launch_products.products(kind, x_RI, matrices).split(outputs, dim=1))
    x_values, x_scale = fp8.to_fp8(x_RI, torch.float32)
    x_values, x_scale_R = x_values.view(torch.uint8), x_scale.squeeze(1)
    y_RO = launch_products.products(kind, x_values, matrices, x_scales_R=x_scale_R, dtype=x_RI.dtype)
    return list(y_RO.split(outputs, dim=1))


def together_unsupported_reason(kind: str, x_RI: Tensor, group_size: int | None) -> str | None:
    """Why one launch does not multiply rows by several matrices; None if it does."""
    if len(x_RI) > launch_products.MAX_GEMV_ROWS:
        return "with so many rows a launch costs nothing"
    return unsupported_reason(kind, x_RI, x_RI.shape[1], group_size)
