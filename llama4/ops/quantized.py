"""Products with quantized matrices on the kernels of a GPU or a CPU, and rounding a matrix to int4.

The readable ways in torch belong to the formats, in `llama4.quantization`, which give them as callables. Which of them
have CPU kernels, the compiled library says (`kernels/cpp/formats.h`).

Shapes: N rows, R rows sorted by expert, I inputs, O outputs, E experts, D hidden size, F expert width, G groups of
inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama4.kernels import abi, cpu, loader, threads
from llama4.kernels.abi import Matrix
from llama4.kernels.triton import launch_products
from llama4.ops import cpu_kernels, experts, quantized_gpu
from llama4.ops.memory import copy_runs


def kernel_name(kind: str, activations: str) -> str:
    """What the CPU kernels call a format."""
    return kind if activations == "float" else f"{kind}_{activations}"


def has_kernels(kind: str, activations: str = "float") -> bool:
    """Whether the kernels read a format of that name."""
    library = loader.library()
    return library is not None and kernel_name(kind, activations) in library.weight_formats


class Parts(NamedTuple):
    """The tensors of a quantized matrix, or with a first dimension E of those of all experts.

    Attributes:
        kind: of the format.
        values: [O, I] int8, or bytes of e4m3; "int4": [O, I / 8] int32, eight values each; blocks of GGUF: their bytes.
        scale: [O, 1]; "int4": [O, G]; None where it stands beside the values.
        inputs: I.
        group_size: of "int4", inputs per scale.
        is_interleaved: whether they are `interleaved16`, which the CPU kernels want of "int4", and those of a GPU of
            nothing.
        activations: "float", or "int8": CPU kernels round inputs.
    """

    kind: str
    values: Tensor
    scale: Tensor | None
    inputs: int
    group_size: int = 0
    is_interleaved: bool = False
    activations: str = "float"

    @property
    def kernel(self) -> str:
        """Its name in the CPU kernels."""
        return kernel_name(self.kind, self.activations)


def linear(x_NI: Tensor, parts: Parts | None, *, readable: Callable[[], Tensor]) -> Tensor:
    """x W^T, [N, O], in the dtype of x: by a kernel that reads the matrix as it is stored, else `readable()`.

    Args:
        parts: the matrix; None: no kernel reads its format. "fp8" rounds x to e4m3 as well, with a scale per row.
    """
    if parts is None:
        return readable()
    kind, values, scale, group_size = parts.kind, parts.values, parts.scale, parts.group_size
    if scale is not None and not quantized_gpu.unsupported_reason(kind, x_NI, parts.inputs, group_size):
        return quantized_gpu.linear(kind, x_NI, values, scale)
    if not unsupported_reason(x_NI, parts):
        return cpu.linear_quantized(parts.kernel, x_NI, values, scale, group_size)
    return readable()


def linears_at_once(kind: str, group_size: int, x_NI: Tensor, matrices: Iterable[Parts | None]) -> list[Tensor] | None:
    """x W^T for each of up to three matrices, by a kernel that takes them all, or with the rows rounded once for all.

    Args:
        kind, group_size: of the format.
        matrices: looked at if there is such a way.

    Returns:
        [N, O] each; None if there is none, or a matrix is of another format, or None.
    """
    if x_NI.ndim != 2 or quantized_gpu.together_unsupported_reason(kind, x_NI, group_size):
        return None
    scaled = []
    for parts in matrices:
        if parts is None or parts.scale is None or (parts.kind, parts.group_size) != (kind, group_size):
            return None
        scaled.append((parts.values, parts.scale))
    return quantized_gpu.linears(kind, x_NI, scaled)


def linear_of_swiglu(gate_NI: Tensor, up_NI: Tensor, parts: Parts) -> Tensor | None:
    """`linear` of silu(gate) * up by kernels that round it as they compute it; None if there are none."""
    if parts.kind != "fp8" or parts.scale is None or gate_NI.ndim != 2 or gate_NI.dtype != up_NI.dtype:
        return None
    for x_NI in (gate_NI, up_NI):
        if quantized_gpu.unsupported_reason(parts.kind, x_NI, parts.inputs, parts.group_size):
            return None
    return quantized_gpu.linear_of_swiglu(parts.kind, gate_NI, up_NI, parts.values, parts.scale)


def dequantized(
    kind: str, values: Tensor, scale: Tensor, dtype: torch.dtype, *, readable: Callable[[], Tensor]
) -> Tensor:
    """A matrix of integers, or some of its rows, in a dtype: by a kernel of a GPU, or the readable way."""
    if quantized_gpu.dequantize_unsupported_reason(kind, values, scale, dtype):
        return readable()
    return launch_products.unpack(kind, values.contiguous(), scale.contiguous())


def swiglu_experts(
    expert: Callable[[Tensor, int], Tensor],
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_up: Parts | None,
    down: Parts | None,
) -> Tensor:
    """`experts.swiglu_experts` with quantized matrices of all experts: on a GPU in two grouped products.

    Args:
        gate_up: D -> 2F, gate first; None: no kernel reads its format.
        down: F -> D.
    """
    if gate_up is None or down is None:
        return experts.loop_over_experts(expert, x_RD, num_tokens_per_expert_E)
    reasons = [
        quantized_gpu.unsupported_reason(stack.kind, x_RD, stack.inputs, stack.group_size) for stack in (gate_up, down)
    ]
    if gate_up.scale is not None and down.scale is not None and not any(reasons):
        counts_E = num_tokens_per_expert_E
        gate_up_R2F = quantized_gpu.linear(gate_up.kind, x_RD, gate_up.values, gate_up.scale, counts_E)
        gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
        return quantized_gpu.linear_of_swiglu(down.kind, gate_RF, up_RF, down.values, down.scale, counts_E)
    return experts.swiglu_matrices(expert, x_RD, num_tokens_per_expert_E, matrix(gate_up), matrix(down))


def unsupported_reason(x_NI: Tensor, parts: Parts) -> str | None:
    """Why the CPU kernels do not multiply rows with a quantized matrix; None if they do."""
    if not len(x_NI):
        return "there are no rows"
    if len(x_NI) > abi.MAX_GEMV_ROWS and len(parts.values) % abi.STRIP:
        return f"the outputs are no multiple of {abi.STRIP}, in which many rows are computed"
    return cpu_kernels.unsupported_reason(x_NI) or _matrix_unsupported_reason(parts)


def matrix(parts: Parts) -> Matrix | None:
    """The description of a matrix, or of those of all experts, for CPU kernels that take several; None if they do not
    read it."""
    if torch.compiler.is_compiling() or _matrix_unsupported_reason(parts):
        return None
    values, scale = parts.values, parts.scale
    described = Matrix(
        w=values.data_ptr(),
        layout=loader.loaded().weight_formats[parts.kernel].number,
        group_size=parts.group_size,
        I=parts.inputs,
        O=values.shape[-2],
        stride=_stride(values),
    )
    if scale is not None:
        described.scales, described.scale_stride = scale.data_ptr(), _stride(scale)
        described.float32_scales = scale.dtype == torch.float32
    return described


def _stride(part: Tensor) -> int:
    """Bytes from one expert to the next."""
    return part.stride(0) * part.element_size() if part.ndim == 3 else 0


def _matrix_unsupported_reason(parts: Parts) -> str | None:
    kind, values, scale = parts.kind, parts.values, parts.scale
    if scale is not None and scale.dtype not in abi.DTYPES:
        return "scales are neither float32 nor bfloat16"
    if not all(part.is_cpu and part.is_contiguous() for part in (values, scale) if part is not None):
        return "the matrix is not contiguous on the CPU"
    if reason := cpu_kernels.library_unsupported_reason():
        return reason
    if not has_kernels(kind, parts.activations):
        return f"there are no kernels for {kind}"
    multiple = loader.loaded().weight_formats[parts.kernel].multiple
    if parts.inputs % multiple:
        return f"the inputs are no multiple of {multiple}"
    if kind == "int4" and not parts.is_interleaved:
        return "int4 values are in a checkpoint's order"
    return None if scale is None else _group_unsupported_reason(kind, parts.group_size)


def _group_unsupported_reason(kind: str, group_size: int) -> str | None:
    if kind == "int4":
        return None if group_size > 0 and group_size % 32 == 0 else "groups are not of a multiple of 32 inputs"
    return "there is more than one scale per output" if group_size else None


def interleave_unsupported_reason(outputs: int, inputs: int, group_size: int) -> str | None:
    """Why an int4 matrix is not stored as `interleaved16`, the order in which kernels read it; None if it is."""
    if reason := cpu_kernels.library_unsupported_reason():
        return reason
    multiple = loader.loaded().weight_formats["int4"].multiple
    if outputs % abi.INTERLEAVE or inputs % multiple:
        return f"[{outputs}, {inputs}] is no multiple of [{abi.INTERLEAVE}, {multiple}]"
    return _group_unsupported_reason("int4", group_size)


def is_stored_interleaved(outputs: int, inputs: int, group_size: int) -> bool:
    """Whether an int4 matrix is stored as `interleaved16` on a CPU."""
    return interleave_unsupported_reason(outputs, inputs, group_size) is None


def interleaved16(part: Tensor, together: int) -> Tensor:
    """Rows [..., O, n] with sixteen of them interleaved, a view [..., O / 16, n / together, 16, together]: the first
    `together` elements of each of sixteen rows, then their next ones, and so on. Of packed int4 values four words go
    together, of scales one."""
    return part.unflatten(-1, (-1, together)).unflatten(-3, (-1, abi.INTERLEAVE)).transpose(-3, -2)


def copied(ordered: Tensor, part: Tensor) -> Tensor:
    """A view of a part in another order as a copy, in the shape of the part. By one thread: two of torch's wait for
    each other longer than the copy takes where others compute."""
    copy = torch.empty_like(part)
    if torch.compiler.is_compiling():  # numbers of threads, and numpy's copies, are no part of a graph
        copy.view(ordered.shape).copy_(ordered)
        return copy
    with threads.torch_by_one_thread():
        copy_runs(copy.view(ordered.shape), ordered)
    return copy


def deinterleaved16(part: Tensor, together: int) -> Tensor:
    """The inverse of `interleaved16`, of a tensor [..., O, n] in that order; a copy."""
    *rows, outputs, count = part.shape
    stored = part.view(*rows, outputs // abi.INTERLEAVE, count // together, abi.INTERLEAVE, together)
    return stored.transpose(-3, -2).reshape(part.shape)


def quantize_int4(
    weight_OI: Tensor, group_size: int, ranges: Sequence[float], *, readable: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Round a matrix to int4: by a kernel, else `readable()`.

    Args:
        weight_OI: float32 or bfloat16.
        group_size: inputs per scale.
        ranges: candidates for the range of a group, in parts of its largest weight; the one with the least squared
            error is taken.

    Returns:
        Packed values [O, I / 8], int32, not interleaved, and scales [O, G] in the dtype of the weight.
    """
    if quantize_unsupported_reason(weight_OI, group_size):
        return readable()
    return cpu.quantize_int4(weight_OI, group_size, ranges)


def quantize_unsupported_reason(weight_OI: Tensor, group_size: int) -> str | None:
    """Why the kernel does not round a matrix to int4; None if it does."""
    if weight_OI.numel() < cpu_kernels.MIN_MATRIX:
        return "the matrix is too small for a call to pay"
    if group_size % abi.LANES or weight_OI.shape[-1] % group_size:
        return f"rows of {weight_OI.shape[-1]} are not whole groups of {group_size}, a multiple of {abi.LANES}"
    return cpu_kernels.unsupported_reason(weight_OI.detach())
