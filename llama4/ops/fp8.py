"""Rounding to e4m3, and torch's own products of e4m3 matrices, which some GPUs have.

Shapes: N rows, R rows sorted by expert, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llama4.kernels.triton import common, launch_elementwise
from llama4.ops import gpu_kernels, swiglu
from llama4.ops.precision import not_zero

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


class Fp8Rows(NamedTuple):
    """Rows rounded to e4m3.

    Attributes:
        values: [..., I], e4m3.
        scale: [..., 1], by which they are multiplied.
    """

    values: Tensor
    scale: Tensor

    @property
    def as_bytes(self) -> Tensor:
        """The values as the Triton kernels take them."""
        return self.values.view(torch.uint8)


def to_fp8(x: Tensor, scale_dtype: torch.dtype) -> Fp8Rows:
    """The largest of each row becomes 448, the largest of e4m3."""
    if gpu_unsupported_reason(x, scale_dtype) is None:
        return Fp8Rows(*launch_elementwise.to_fp8(x))
    wide = x.float()
    largest = wide.new_full((1,), LARGEST)  # dividing by a number, a GPU multiplies by its inverse: other scales
    scale = not_zero((wide.abs().amax(-1, keepdim=True) / largest).to(scale_dtype))
    return Fp8Rows((wide / scale.float()).clamp_(-LARGEST, LARGEST).to(E4M3), scale)


def swiglu_to_fp8(gate_NF: Tensor, up_NF: Tensor) -> Fp8Rows:
    """`to_fp8` of `swiglu`, with scales in float32: on a GPU in one kernel, which does not write what it rounds."""
    reason = gpu_unsupported_reason(gate_NF, torch.float32) or swiglu.gpu_unsupported_reason(gate_NF, up_NF)
    if reason is None:
        return Fp8Rows(*launch_elementwise.swiglu_to_fp8(gate_NF, up_NF))
    return to_fp8(swiglu.swiglu(gate_NF, up_NF), torch.float32)


def gpu_unsupported_reason(x: Tensor, scale_dtype: torch.dtype) -> str | None:
    """Why the Triton kernel does not round these; None if it does."""
    if scale_dtype != torch.float32:
        return "scales are not float32"
    if x.shape[-1] > common.MAX_WIDTH:
        return f"rows are wider than {common.MAX_WIDTH}"
    return gpu_kernels.unsupported_reason(x)


def scaled_linear(x_NI: Tensor, values_OI: Tensor, scale_O1: Tensor, *, readable: Callable[[], Tensor]) -> Tensor:
    """x W^T, [N, O], with x rounded to e4m3: torch's own product where there is one, else `readable()`."""
    if not torch_multiplies(x_NI.dtype, values_OI):
        return readable()
    return scaled_mm(to_fp8(x_NI, torch.float32), values_OI, scale_O1, x_NI.dtype)


def scaled_mm(x: Fp8Rows, values_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T, [N, O], where `torch_multiplies`."""
    weight_IO, scale_1O = values_OI.view(E4M3).mT, scale_O1.mT.float().contiguous()
    return torch._scaled_mm(x.values, weight_IO, x.scale, scale_1O, out_dtype=dtype, use_fast_accum=True)


def scaled_grouped_mm(
    x: Fp8Rows, values_EOI: Tensor, scale_EO1: Tensor, counts_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same with the matrix of each row's expert, [R, O]."""
    weight_EIO, scale_R, scale_EO = values_EOI.view(E4M3).mT, x.scale.squeeze(1), scale_EO1.squeeze(2).float()
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    return torch._scaled_grouped_mm(
        x.values, weight_EIO, scale_R, scale_EO, offs=ends_E, out_dtype=dtype, use_fast_accum=True
    )


def torch_multiplies(dtype: torch.dtype, values: Tensor, *, grouped: bool = False) -> bool:
    """Whether torch multiplies rows of e4m3 with such a matrix, or with those of all experts, on its device, with a
    scale per row and per output. The dtype of the result must be bfloat16; sizes must be multiples of 16."""
    return (
        dtype == torch.bfloat16
        and values.shape[-1] % 16 == values.shape[-2] % 16 == 0
        and has_fp8_matmul(values.device, grouped)
    )


@lru_cache
def has_fp8_matmul(device: torch.device, grouped: bool = False) -> bool:
    """Whether a device multiplies e4m3 fast. A CPU can, but a hundred times slower than bfloat16."""
    if device.type == "cpu":
        return False
    one = Fp8Rows(torch.ones(16, 16, device=device).to(E4M3), torch.ones(16, 1, device=device))
    try:
        if grouped:
            counts = torch.tensor([16], device=device)
            scaled_grouped_mm(one, one.values[None], one.scale[None], counts, torch.bfloat16)
        else:
            scaled_mm(one, one.values, one.scale, torch.bfloat16)
    except RuntimeError:
        return False
    return True
