"""Rounding to e4m3, and torch's own products of e4m3 matrices, which some GPUs have.

Shapes: N rows, R rows sorted by expert, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from llama4.kernels.triton import common, launch_elementwise
from llama4.ops import gpu_kernels
from llama4.ops.precision import not_zero

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


def to_fp8(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """e4m3 values and scales [..., 1]: the largest of each row becomes 448, the largest of e4m3."""
    if gpu_unsupported_reason(x, scale_dtype) is None:
        return launch_elementwise.to_fp8(x)
    wide = x.float()
    largest = wide.new_full((1,), LARGEST)  # dividing by a number, a GPU multiplies by its inverse: other scales
    scale = not_zero(wide.abs().amax(-1, keepdim=True) / largest).to(scale_dtype)
    return (wide / scale.float()).clamp_(-LARGEST, LARGEST).to(E4M3), scale


def gpu_unsupported_reason(x: Tensor, scale_dtype: torch.dtype) -> str | None:
    """Why the Triton kernel does not round these; None if it does."""
    if scale_dtype != torch.float32:
        return "scales are not float32"
    if x.shape[-1] > common.MAX_WIDTH:
        return f"rows are wider than {common.MAX_WIDTH}"
    return gpu_kernels.unsupported_reason(x)


def scaled_linear(x_NI: Tensor, values_OI: Tensor, scale_O1: Tensor, *, readable: Callable[[], Tensor]) -> Tensor:
    """x W^T, [N, O], with x rounded to e4m3: torch's own product where there is one, else `readable()`."""
    return scaled_mm(x_NI, values_OI, scale_O1) if torch_multiplies(x_NI, values_OI) else readable()


def scaled_mm(x_NI: Tensor, values_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """The same where `torch_multiplies`."""
    x_values, x_scale = to_fp8(x_NI, torch.float32)
    weight_scale, weight_IO = scale_O1.mT.float().contiguous(), values_OI.view(E4M3).mT
    return torch._scaled_mm(x_values, weight_IO, scale_a=x_scale, scale_b=weight_scale, out_dtype=x_NI.dtype)


def scaled_grouped_mm(x_RI: Tensor, values_EOI: Tensor, scale_EO1: Tensor, counts_E: Tensor) -> Tensor:
    """The same with the matrix of each row's expert, [R, O]."""
    x_values, x_scale = to_fp8(x_RI, torch.float32)
    return torch._scaled_grouped_mm(
        x_values,
        values_EOI.view(E4M3).mT,
        x_scale.squeeze(1),
        scale_EO1.squeeze(2).float(),
        offs=counts_E.cumsum(0).to(torch.int32),
        out_dtype=x_RI.dtype,
    )


def torch_multiplies(x_NI: Tensor, values: Tensor, *, grouped: bool = False) -> bool:
    """Whether torch multiplies e4m3 on that device, with a scale per row and per output, by one matrix or by those of
    all experts. Its result is bfloat16; sizes must be multiples of 16."""
    return (
        x_NI.dtype == torch.bfloat16
        and x_NI.shape[1] % 16 == values.shape[-2] % 16 == 0
        and has_fp8_matmul(x_NI.device, grouped)
    )


@lru_cache
def has_fp8_matmul(device: torch.device, grouped: bool = False) -> bool:
    """Whether a device multiplies e4m3 fast. A CPU can, but a hundred times slower than bfloat16."""
    if device.type == "cpu":
        return False
    one = torch.ones(16, 16, device=device).to(E4M3)
    scale = torch.ones(16, 1, device=device)
    try:
        if grouped:
            ends = torch.tensor([16], dtype=torch.int32, device=device)
            torch._scaled_grouped_mm(one, one[None].mT, scale[:, 0], scale.mT, offs=ends, out_dtype=torch.bfloat16)
        else:
            torch._scaled_mm(one, one.mT, scale_a=scale, scale_b=scale.mT.contiguous(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True
