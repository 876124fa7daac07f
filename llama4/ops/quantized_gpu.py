"""Products with quantized matrices on the Triton kernels of a GPU.

Shapes: R routed rows sorted by expert, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.kernels.triton import launch


def unsupported_reason(kind: str, x_RI: Tensor, group_size: int | None) -> str | None:
    """Why no kernel multiplies these rows with a matrix of a format, `group_size` inputs to a scale; None if one does.
    That the kernels do not run on a GPU is logged once."""
    if not x_RI.is_cuda:
        return "the rows are not on a GPU"
    if kind not in launch.KINDS:
        return f"there are no kernels for {kind}"
    if (group_size or x_RI.shape[1]) % 16:
        return "the inputs of a scale are no multiple of 16"
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    if x_RI.requires_grad and torch.is_grad_enabled():
        return "a tensor needs a gradient"
    return launch.unsupported_reason(x_RI.device, x_RI.dtype)


def is_gemv(x_RI: Tensor) -> bool:
    """Whether the rows are so few that reading the matrices takes longer than computing."""
    return len(x_RI) <= launch.MAX_GEMV_ROWS


def product(
    kind: str,
    x_RI: Tensor,
    values: Tensor,
    scale: Tensor,
    counts_E: Tensor | None = None,
    *,
    x_scale_R: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T, [R, O], where `unsupported_reason` is None; the host does not wait for the device.

    Args:
        x_RI: rows; of "fp8" bytes of e4m3.
        values: [O, I] or [E, O, I]: int8, bytes of e4m3, or of "int4" [.., I / 8] int32.
        scale: [O, G] or [E, O, G].
        counts_E: rows of each expert, on the rows' device; None: there is one matrix.
        x_scale_R: float32, of "fp8".
        dtype: of the result; by default that of x.
    """
    return launch.product(kind, x_RI, values, scale, counts_E, x_scales_R=x_scale_R, dtype=dtype)
