"""Root-mean-square normalisation (Zhang & Sennrich 2019).

Shapes: N tokens, D hidden size, k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.kernels import cpu
from llama4.kernels.triton import common, launch_elementwise
from llama4.ops import cpu_kernels, gpu_kernels, routing
from llama4.ops.precision import upcast


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 or better."""
    x = upcast(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_normalise(x) * weight`, [..., D]. Takes any dtype, returns that of the weight."""
    if unsupported_reason(x, weight_D) is None:
        return cpu.rms_norm(x, weight_D, eps)
    if gpu_unsupported_reason(x, weight_D) is None:
        return launch_elementwise.rms_norm(x, weight_D, eps)
    return (rms_normalise(x, eps) * weight_D).type_as(weight_D)


def add_rms_norm(x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A step of the residual stream, x + delta in float32 or better, and `rms_norm` of it."""
    if gpu_unsupported_reason(x_ND, weight_D, delta_ND) is None:
        return launch_elementwise.add_rms_norm(x_ND, delta_ND, weight_D, eps)
    x_ND = upcast(x_ND) + delta_ND
    return x_ND, rms_norm(x_ND, weight_D, eps)


def add_experts_rms_norm(
    x_ND: Tensor, shared_ND: Tensor, routed_RD: Tensor, rows_Nk: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same where delta is the output of a mixture of experts: see `ops.routing.combine`."""
    if gpu_unsupported_reason(x_ND, weight_D, shared_ND, routed_RD) is None:
        return launch_elementwise.add_rms_norm(x_ND, shared_ND, weight_D, eps, routed_RD, rows_Nk)
    return add_rms_norm(x_ND, routing.combine(routed_RD, rows_Nk, shared_ND), weight_D, eps)


def unsupported_reason(x: Tensor, weight_D: Tensor) -> str | None:
    """Why the compiled kernel does not take these; None if it does."""
    if x.dtype != torch.float32:
        return "x is not float32, as the residual stream is"
    if (reason := _weight_unsupported_reason(x, weight_D)) is not None:
        return reason
    return cpu_kernels.elementwise_unsupported_reason(len(weight_D), x, weight_D)


def gpu_unsupported_reason(x: Tensor, weight_D: Tensor, *deltas: Tensor) -> str | None:
    """Why the Triton kernel does not take these, and what is added to x; None if it does."""
    if len(weight_D) > common.MAX_WIDTH:
        return f"rows are wider than {common.MAX_WIDTH}"
    if (reason := _weight_unsupported_reason(x, weight_D)) is not None:
        return reason
    return gpu_kernels.unsupported_reason(x, weight_D, *deltas)


def _weight_unsupported_reason(x: Tensor, weight_D: Tensor) -> str | None:
    if weight_D.shape != x.shape[-1:] or not weight_D.is_contiguous():
        return "the weight is not a number for each of a row, one behind the other"
    return None
