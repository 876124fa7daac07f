"""Products with quantized matrices on the compiled CPU kernels, and rounding a matrix to int4 there.

The readable ways in torch belong to the formats, in `llama4.quantization`. A format that has kernels is in `KINDS`.

Shapes: N rows, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4.kernels import abi, build, cpu
from llama4.kernels.abi import Matrix
from llama4.ops import cpu_kernels

KINDS = frozenset(abi.QUANTIZED)
"""Formats that the kernels read, by name."""


def linear(kind: str, x_NI: Tensor, values: Tensor, scale: Tensor, group_size: int = 0) -> Tensor:
    """x W^T, [N, O], in the dtype of x, where `unsupported_reason` is None.

    Args:
        kind: one of `KINDS`. "fp8" rounds x to e4m3 as well, with a scale per row.
        x_NI: float32 or bfloat16.
        values: [O, I] int8, or bytes of e4m3; "int4": [O, I / 8] int32, eight values each, `interleaved16`.
        scale: [O, 1]; "int4": [O, G], `interleaved16`.
        group_size: of "int4", inputs per scale.
    """
    return cpu.linear_quantized(kind, x_NI, values, scale, group_size)


def unsupported_reason(kind: str, x_NI: Tensor, values: Tensor, scale: Tensor, group_size: int = 0) -> str | None:
    """Why the kernels do not multiply rows with a quantized matrix; None if they do."""
    if not len(x_NI):
        return "there are no rows"
    if len(x_NI) > abi.MAX_GEMV_ROWS and len(values) % abi.STRIP:
        return f"the outputs are no multiple of {abi.STRIP}, in which many rows are computed"
    return cpu_kernels.unsupported_reason(x_NI) or _matrix_unsupported_reason(
        kind, values, scale, x_NI.shape[1], group_size
    )


def matrix(kind: str, values: Tensor, scale: Tensor, outputs: int, inputs: int, group_size: int = 0) -> Matrix | None:
    """The description of a matrix, or of those of all experts, [E, ...], for kernels that take several; None if they do
    not read it."""
    if _matrix_unsupported_reason(kind, values, scale, inputs, group_size) or torch.compiler.is_compiling():
        return None
    return Matrix(
        w=values.data_ptr(),
        scales=scale.data_ptr(),
        float32_scales=scale.dtype == torch.float32,
        layout=abi.QUANTIZED[kind],
        group_size=group_size,
        I=inputs,
        O=outputs,
        stride=values.stride(0) * values.element_size() if values.ndim == 3 else 0,
        scale_stride=scale.stride(0) * scale.element_size() if scale.ndim == 3 else 0,
    )


def _matrix_unsupported_reason(kind: str, values: Tensor, scale: Tensor, inputs: int, group_size: int) -> str | None:
    if kind not in KINDS:
        return f"there are no kernels for {kind}"
    if scale.dtype not in abi.DTYPES:
        return "scales are neither float32 nor bfloat16"
    if not (values.is_cpu and scale.is_cpu and values.is_contiguous() and scale.is_contiguous()):
        return "the matrix is not contiguous on the CPU"
    if inputs % abi.INPUTS[kind]:
        return f"the inputs are no multiple of {abi.INPUTS[kind]}"
    return _group_unsupported_reason(kind, group_size)


def _group_unsupported_reason(kind: str, group_size: int) -> str | None:
    if kind == "int4":
        is_read = group_size in (32, 64) or (group_size > 0 and group_size % 128 == 0)
        return None if is_read else "groups are not of 32, 64 or a multiple of 128 inputs"
    return "there is more than one scale per output" if group_size else None


def interleave_unsupported_reason(outputs: int, inputs: int, group_size: int) -> str | None:
    """Why an int4 matrix is not stored as `interleaved16`, the order in which kernels read it; None if it is."""
    if outputs % abi.INTERLEAVE or inputs % abi.INPUTS["int4"]:
        return f"[{outputs}, {inputs}] is no multiple of [{abi.INTERLEAVE}, {abi.INPUTS['int4']}]"
    if build.library() is None:
        return "the CPU kernels are switched off or could not be built"
    return _group_unsupported_reason("int4", group_size)


def interleaved16(part: Tensor, together: int) -> Tensor:
    """Rows [..., O, n] with sixteen of them interleaved, a view [..., O / 16, n / together, 16, together]: the first
    `together` elements of each of sixteen rows, then their next ones, and so on. Of packed int4 values four words go
    together, of scales one."""
    return part.unflatten(-1, (-1, together)).unflatten(-3, (-1, abi.INTERLEAVE)).transpose(-3, -2)


def deinterleaved16(part: Tensor, together: int) -> Tensor:
    """The inverse of `interleaved16`, of a tensor [..., O, n] in that order; a copy."""
    *rows, outputs, count = part.shape
    stored = part.view(*rows, outputs // abi.INTERLEAVE, count // together, abi.INTERLEAVE, together)
    return stored.transpose(-3, -2).reshape(part.shape)


def quantize_int4(weight_OI: Tensor, group_size: int, ranges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Round a matrix to int4, where `quantize_unsupported_reason` is None.

    Args:
        weight_OI: float32 or bfloat16.
        group_size: inputs per scale.
        ranges: candidates for the range of a group, in parts of its largest weight; the one with the least squared
            error is taken.

    Returns:
        Packed values [O, I / 8], int32, not interleaved, and scales [O, G] in the dtype of the weight.
    """
    return cpu.quantize_int4(weight_OI, group_size, ranges)


def quantize_unsupported_reason(weight_OI: Tensor, group_size: int) -> str | None:
    """Why the kernel does not round a matrix to int4; None if it does."""
    if weight_OI.numel() < cpu_kernels.MIN_MATRIX:
        return "the matrix is too small for a call to pay"
    if group_size % abi.LANES or weight_OI.shape[-1] % group_size:
        return f"rows of {weight_OI.shape[-1]} are not whole groups of {group_size}, a multiple of {abi.LANES}"
    return cpu_kernels.unsupported_reason(weight_OI.detach())
