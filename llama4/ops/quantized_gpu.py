"""Products with quantized matrices on the Triton kernels of a GPU.

Shapes: R routed rows sorted by expert, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.kernels.triton import common, launch_products, support
from llama4.ops import fp8
from llama4.ops.swiglu import swiglu

MIN_UNPACKED_ROWS = 384
"""Rows of a matrix, on average, from which on it is unpacked to bfloat16 for torch's product. To unpack a weight of
int4 moves 4.5 bytes, which takes 1.1 ps at 4 TB/s; a row saves two operations at 375 TFLOP/s by the Triton kernel for
two at 750 by torch, 2.7 fs: about 400 rows pay for it. Seen on an H200."""
MAX_UNPACKED = 1 << 30
"""Bytes of unpacked weights at a time."""


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
    if unpacking_unsupported_reason(kind, x_RI, scale, counts_E) is None:
        return unpacked_linear(kind, x_RI, values, scale, counts_E)
    if kind != "fp8":
        return launch_products.product(kind, x_RI, values, scale, counts_E)
    return _fp8_linear(fp8.to_fp8(x_RI, torch.float32), values, scale, counts_E, x_RI.dtype)


def unpacking_unsupported_reason(kind: str, x_RI: Tensor, scale: Tensor, counts_E: Tensor | None) -> str | None:
    """Why `linear` does not unpack a matrix; None if it does."""
    if kind == "fp8":
        return "values in e4m3 are multiplied as they are"
    if x_RI.dtype != torch.bfloat16:
        return "the rows are not bfloat16"
    if len(x_RI) < MIN_UNPACKED_ROWS * (1 if counts_E is None else len(counts_E)):
        return "the rows are too few"
    if common.gpu(x_RI.device).capability // 10 != 9:
        return "it was seen to be faster on Hopper alone"
    if scale.shape[-2] % 8:
        return "torch's grouped product wants a multiple of 8 outputs"
    return None


def unpacked_linear(kind: str, x_RI: Tensor, values: Tensor, scale: Tensor, counts_E: Tensor | None) -> Tensor:
    """`linear` by torch's product with the matrix in bfloat16, some outputs after the other.

    Each weight is rounded once to bfloat16, where the kernels that read packed weights round none: a product with int4
    has a relative error of 0.22%, in place of 0.17%.
    """
    values, scale = values.contiguous(), scale.contiguous()
    of_an_output = 2 * x_RI.shape[1] * (1 if counts_E is None else len(counts_E))
    at_once = max(MAX_UNPACKED // of_an_output // 256 * 256, 256)
    ends_E = None if counts_E is None else counts_E.cumsum(0, dtype=torch.int32)

    def some(values_part: Tensor, scale_part: Tensor) -> Tensor:
        weight = launch_products.unpack(kind, values_part, scale_part)
        return x_RI @ weight.mT if ends_E is None else F.grouped_mm(x_RI, weight.mT, offs=ends_E)

    if at_once >= scale.shape[-2]:
        return some(values, scale)
    y_RO = x_RI.new_empty(len(x_RI), scale.shape[-2])
    for part_RO, *parts in zip(*(x.split(at_once, d) for x, d in ((y_RO, 1), (values, -2), (scale, -2))), strict=True):
        part_RO.copy_(some(*parts))
    return y_RO


def dequantize_unsupported_reason(kind: str, values: Tensor, scale: Tensor, dtype: torch.dtype) -> str | None:
    """Why `launch_products.unpack` does not give some rows of a matrix in a dtype; None if it does."""
    if not values.is_cuda:
        return "the matrix is not on a GPU"
    if kind not in ("int4", "int8") or dtype != torch.bfloat16:
        return f"there is no kernel from {kind} to {dtype}"
    inputs = values.shape[-1] * (8 if kind == "int4" else 1)
    if (inputs // scale.shape[-1]) % 8:
        return "the inputs of a scale are no multiple of 8"
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    return support.unsupported_reason(values.device, dtype)


def linear_of_swiglu(
    kind: str, gate_RI: Tensor, up_RI: Tensor, values: Tensor, scale: Tensor, counts_E: Tensor | None = None
) -> Tensor:
    """`linear` of silu(gate) * up. For "fp8" one kernel computes and rounds that."""
    if kind != "fp8":
        return linear(kind, swiglu(gate_RI, up_RI), values, scale, counts_E)
    return _fp8_linear(fp8.swiglu_to_fp8(gate_RI, up_RI), values, scale, counts_E, gate_RI.dtype)


def linears(kind: str, x_RI: Tensor, matrices: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`linear` by up to three matrices, each values and scale, where `together_unsupported_reason` is None: with few
    rows views [R, O] of one tensor, which one launch computes. "fp8" rounds the rows once for all."""
    if kind != "fp8":
        y_RO = launch_products.products(kind, x_RI, matrices)
    else:
        x = fp8.to_fp8(x_RI, torch.float32)
        if len(x_RI) > launch_products.MAX_GEMV_ROWS:
            return [_fp8_linear(x, values, scale, None, x_RI.dtype) for values, scale in matrices]
        y_RO = launch_products.products(kind, x.as_bytes, matrices, x_scales_R=x.scale.squeeze(1), dtype=x_RI.dtype)
    return list(y_RO.split([scale.shape[0] for _, scale in matrices], dim=1))


def together_unsupported_reason(kind: str, x_RI: Tensor, group_size: int | None) -> str | None:
    """Why `linears` does not multiply rows by several matrices at once; None if it does."""
    if reason := unsupported_reason(kind, x_RI, x_RI.shape[1], group_size):
        return reason
    if kind != "fp8" and len(x_RI) > launch_products.MAX_GEMV_ROWS:
        return "with so many rows a launch costs nothing"
    return None


def _fp8_linear(x: fp8.Fp8Rows, values: Tensor, scale: Tensor, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    is_many = not launch_products.are_few(len(x.values), counts_E)
    if is_many and fp8.torch_multiplies(dtype, values, grouped=counts_E is not None):
        if counts_E is None:
            return fp8.scaled_mm(x, values, scale, dtype)
        return fp8.scaled_grouped_mm(x, values, scale, counts_E, dtype)
    x_scales_R = x.scale.squeeze(1)
    return launch_products.product("fp8", x.as_bytes, values, scale, counts_E, x_scales_R=x_scales_R, dtype=dtype)
