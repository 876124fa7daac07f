"""Launches the kernels of `quantized` and `grouped`: products with quantized matrices, and with experts in bfloat16, on
a GPU. No launch waits for the device.

Shapes: R rows, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4.kernels.triton import common

MAX_GEMV_ROWS = 4
"""Most rows of one matrix for `gemv`, or of several matrices in one launch; a program has all of them. Measured on an
H200: of 8 rows, for which it would read a matrix twice, the kernel for many takes 0.4 to 0.65 of the time. The sizes of
blocks below are an H100's."""
MAX_GEMV_EXPERT_ROWS = 8
"""Most rows of all experts together, whose matrices it reads once per row. 16 rows that chance spread over 16 or 128
experts took a sixth to a third less by it in int4 on an H200; but four layers of Scout, whose rows shared experts, took
2.8 ms in place of 1.9."""
KINDS = ("int4", "int8", "fp8")
_EXPONENT = 0x4B000000
"""The bits of 2^23 in float32."""


def product(
    kind: str,
    x_RI: Tensor,
    values: Tensor,
    scales: Tensor,
    counts_E: Tensor | None = None,
    *,
    x_scales_R: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T, [R, O], without waiting for the device.

    Args:
        kind: "int4", "int8" or "fp8".
        x_RI: rows, sorted by expert; bytes of e4m3 for "fp8".
        values: [E, O, I] or [O, I], int8 or bytes of e4m3; of "int4" [.., I / 8], int32.
        scales: [E, O, G] or [O, G], any float.
        counts_E: rows of each expert, on the device of the rows; they sum to R. None: there is one matrix.
        x_scales_R: float32, for "fp8".
        dtype: of the result; by default that of x.
    """
    if are_few(len(x_RI), counts_E):
        return _gemv(kind, x_RI, [(values, scales)], counts_E, x_scales_R, dtype)
    from llama4.kernels.triton import quantized

    values, scales, x_RI = values.contiguous(), scales.contiguous(), x_RI.contiguous()
    (rows, inputs), outputs, E = x_RI.shape, scales.shape[-2], 1 if counts_E is None else len(counts_E)
    y_RO = torch.empty(rows, outputs, dtype=dtype or x_RI.dtype, device=x_RI.device)
    group, most = _group(inputs, scales), min(E, rows)
    blocks = _gemm_blocks(x_RI, rows, E, group)
    tiles = most + (rows - most) // blocks["BLOCK_R"]  # `most` experts have one row more than whole tiles
    values = values if kind == "int8" else values.view(torch.uint8)
    tensors, numbers = (x_RI, values, scales, x_scales_R, counts_E, y_RO), (rows, outputs)
    sizes = {"inputs": inputs, "E": E, "kind": kind, "group": group, **blocks}
    grid = (tiles * -(-outputs // blocks["BLOCK_O"]),)
    common.launch(quantized.grouped_gemm, grid, x_RI, *tensors, *numbers, **sizes)
    return y_RO


def are_few(rows: int, counts_E: Tensor | None) -> bool:
    """Whether `product` is for few rows: of one matrix, or of experts."""
    return rows <= (MAX_GEMV_ROWS if counts_E is None else MAX_GEMV_EXPERT_ROWS)


def products(
    kind: str,
    x_RI: Tensor,
    matrices: Sequence[tuple[Tensor, Tensor]],
    *,
    x_scales_R: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`product` of at most `MAX_GEMV_ROWS` rows with each of up to three matrices, [R, O + O + O], in one launch.

    Args:
        matrices: values and scales of each.
    """
    assert len(x_RI) <= MAX_GEMV_ROWS
    return _gemv(kind, x_RI, matrices, None, x_scales_R, dtype)


def grouped_mm(x_RI: Tensor, counts_E: Tensor, weight_EIO: Tensor) -> Tensor:
    """x W, [R, O], with the matrix of each row's expert, in bfloat16, on Hopper.

    Args:
        x_RI: rows, sorted by expert; I is a multiple of 64, O of 8.
        counts_E: as of `product`.
        weight_EIO: contiguous.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from llama4.kernels.triton import grouped

    (rows, inputs), (E, _, outputs), x_RI = x_RI.shape, weight_EIO.shape, x_RI.contiguous()
    y_RO = torch.empty(rows, outputs, dtype=x_RI.dtype, device=x_RI.device)
    if not rows:
        return y_RO
    blocks = _grouped_blocks(rows, E)
    block_r, more_r, block_o, block_i = (blocks[name] for name in ("BLOCK_R", "MORE_R", "BLOCK_O", "BLOCK_I"))
    most = min(E, rows)
    tiles = most + (rows - most) // (block_r + more_r)
    operands = (
        TensorDescriptor.from_tensor(x_RI, [block_r, block_i]),
        TensorDescriptor.from_tensor(x_RI, [more_r, block_i]) if more_r else None,
        TensorDescriptor.from_tensor(weight_EIO.view(E * inputs, outputs), [block_i, block_o]),
    )
    grid, sizes = (tiles * -(-outputs // block_o),), {"inputs": inputs, "E": E, **blocks}
    common.launch(grouped.grouped_mm, grid, x_RI, *operands, counts_E, y_RO, rows, outputs, **sizes)
    return y_RO


def _grouped_blocks(rows: int, E: int) -> dict[str, int]:
    """As many rows at once as an expert has on average, so that its matrix is read once; about 128 of them are more for
    half of the experts. Measured on an H200."""
    mean = rows // E
    sizes = {"MORE_R": 0, "BLOCK_O": 256, "BLOCK_I": 64, "TILES": 8, "num_stages": 4}
    if mean <= 32:
        return {**sizes, "BLOCK_R": 64, "num_warps": 4}
    if 96 < mean <= 160:
        return {**sizes, "BLOCK_R": 128, "MORE_R": 64, "TILES": 4, "num_warps": 8, "num_stages": 3}
    return {**sizes, "BLOCK_R": 128, "num_warps": 8}


def unpack(kind: str, values: Tensor, scales: Tensor) -> Tensor:
    """Matrices in bfloat16, [E, O, I] or [O, I]: each weight, a value times its scale, is rounded once.

    Args:
        kind: "int4" or "int8".
        values: as of `product`; those of one matrix are neighbours.
        scales: likewise.
    """
    from llama4.kernels.triton import quantized

    *experts, outputs, groups = scales.shape
    values = values.view(torch.int32)
    in_row = values.shape[-1]
    inputs = in_row * (8 if kind == "int4" else 4)
    weights = torch.empty(*experts, outputs, inputs, dtype=torch.bfloat16, device=values.device)
    E, words = experts[0] if experts else 1, outputs * in_row
    numbers = words, values.stride(0), scales.stride(0)
    sizes = {"kind": kind, "group": inputs // groups, "BLOCK": common.BLOCK}
    common.launch(quantized.unpack, (-(-words // common.BLOCK), E), values, values, scales, weights, *numbers, **sizes)
    return weights


def _gemv(
    kind: str,
    x_RI: Tensor,
    matrices: Sequence[tuple[Tensor, Tensor]],
    counts_E: Tensor | None,
    x_scales_R: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    from llama4.kernels.triton import quantized

    assert len(matrices) == 1 if counts_E is not None else 1 <= len(matrices) <= 3
    x_RI, absent = x_RI.contiguous(), 3 - len(matrices)
    (rows, inputs), E = x_RI.shape, 1 if counts_E is None else len(counts_E)
    outputs = [scales.shape[-2] for _, scales in matrices] + [0] * absent
    parts: list[Tensor | None] = []
    for values, scales in matrices:
        parts += values.contiguous().view(torch.uint32), scales.contiguous()
    parts += [None] * (2 * absent)
    y_RO = torch.empty(rows, sum(outputs), dtype=dtype or x_RI.dtype, device=x_RI.device)
    if not rows:
        return y_RO
    early = common.gpu(x_RI.device).capability >= 90
    blocks = _gemv_blocks(kind, rows if counts_E is None else 1, outputs, inputs)
    grid = -(-rows // blocks["BLOCK_R"]), sum(-(-o // blocks["BLOCK_O"]) for o in outputs)
    group = _group(inputs, matrices[0][1])
    sizes = {"inputs": inputs, "E": E, "kind": kind, "group": group, "EARLY": early, **blocks}
    tensors, numbers = (*parts[:2], x_scales_R, counts_E, y_RO, *parts[2:]), (_EXPONENT, rows, *outputs)
    common.launch(quantized.gemv, grid, x_RI, x_RI, *tensors, *numbers, **sizes, launch_pdl=early)
    return y_RO


def _group(inputs: int, scales: Tensor) -> int:
    """Inputs that share a scale; 0 if all do."""
    groups = scales.shape[-1]
    return inputs // groups if groups > 1 else 0


def _gemv_blocks(kind: str, rows: int, outputs: Sequence[int], inputs: int) -> dict[str, int]:
    """Few outputs are spread over more threads."""
    threads, is_small = inputs // (32 if kind == "int4" else 16), sum(outputs) < 8192
    warps = 2 if is_small and threads % 64 == 0 else 1
    most = 2 if is_small and warps == 1 and rows == 1 else 4
    return {
        "BLOCK_R": common.next_power_of_two(rows),
        "BLOCK_O": min(most, 1 << (min(o for o in outputs if o).bit_length() - 1)),
        "THREADS": 32 * warps,
        "num_warps": warps,
    }


def _gemm_blocks(x_RI: Tensor, rows: int, E: int, group: int) -> dict[str, int]:
    """As many rows at once as an expert has on average. All fit into the registers, and before Hopper into the 99 KiB
    of shared memory that the smallest of GPUs has. Where programs are few, each has more loads under way."""
    at_once = min(max(common.next_power_of_two(-(-rows // E)), 16), 128)
    stages = 3 if common.gpu(x_RI.device).capability == 90 else 2
    if x_RI.dtype == torch.float32:
        most, blocks = 32, {"BLOCK_R": min(at_once, 64), "BLOCK_O": 64, "num_warps": 4}
    elif at_once < 64:
        most, blocks = 128, {"BLOCK_R": at_once, "BLOCK_O": 64, "num_warps": 4}
        stages = 6 if E == 1 else 3
    else:
        most, blocks = 64, {"BLOCK_R": at_once, "BLOCK_O": 128, "num_warps": 8}
    return {**blocks, "BLOCK_I": min(_power_in(group or x_RI.shape[1]), most), "TILES": 8, "num_stages": stages}


def _power_in(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n
