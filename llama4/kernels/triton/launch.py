"""Launches the kernels of `quantized` for products with quantized matrices on a GPU.

Triton comes with torch's builds for CUDA. It is imported at the first product; where it cannot run, torch's own
operations serve.

Shapes: R rows, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_GEMV_ROWS = 8
"""Most rows, of all experts together, for `gemv`, which reads an expert's matrix once per row. Not measured yet, like
the sizes of blocks below."""
KINDS = ("int4", "int8", "fp8")
SWITCH = "LLAMA4_GPU_KERNELS"
"""Environment variable; "off" keeps to torch."""


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take rows there; None if they do."""
    if device.type != "cuda":
        return f"they are for GPUs, not for {device.type}"
    if os.environ.get(SWITCH, "").lower() == "off":
        return f"{SWITCH} is off"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they do not take {dtype}"
    return _failure(device)


@cache
def _failure(device: torch.device) -> str | None:
    """What is wrong with a product whose result is known; logged once."""
    try:
        x, values = torch.ones(1, 32, device=device), torch.ones(4, 32, dtype=torch.int8, device=device)
        y = product("int8", x, values, torch.full((4, 1), 0.5, device=device))
        if y.eq(16).all():
            return None
        reason = f"a product gave {y[0, 0].item()} instead of 16"
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    logger.warning("the Triton kernels do not run on %s (%s); torch's own products are slower", device, reason)
    return reason


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
    from llama4.kernels.triton import quantized

    x_RI, values, scales = x_RI.contiguous(), values.contiguous(), scales.contiguous()
    (rows, inputs), (outputs, groups) = x_RI.shape, scales.shape[-2:]
    y_RO = torch.empty(rows, outputs, dtype=dtype or x_RI.dtype, device=x_RI.device)
    if not rows:
        return y_RO
    E = 1 if counts_E is None else len(counts_E)
    group = inputs // groups if groups > 1 else 0
    if rows <= MAX_GEMV_ROWS:
        kernel, tiles, blocks = quantized.gemv, rows, _gemv_blocks(kind, inputs, group)
    else:
        kernel, most = quantized.grouped_gemm, min(E, rows)
        blocks = _gemm_blocks(x_RI.dtype, -(-rows // E), inputs, group)
        tiles = most + (rows - most) // blocks["BLOCK_R"]  # `most` experts have one row more than whole tiles
    grid = tiles, -(-outputs // blocks["BLOCK_O"])
    values = values if kind == "int8" else values.view(torch.uint8)
    tensors = x_RI, values, scales, x_scales_R, counts_E, y_RO
    with torch.cuda.device_of(x_RI):
        kernel[grid](*tensors, rows, outputs, inputs, E=E, kind=kind, group=group, enable_fp_fusion=True, **blocks)
    return y_RO


def _gemv_blocks(kind: str, inputs: int, group: int) -> dict[str, int]:
    """Eight or sixteen bytes for each thread of a warp, side by side, and a few such loads under way."""
    block = min(_power_in(inputs), 1024 if kind == "int4" else 512)
    return {"BLOCK_O": 8, "BLOCK_I": block, "STEP": min(_power_in(group or inputs), block)}


def _gemm_blocks(dtype: torch.dtype, rows: int, inputs: int, group: int) -> dict[str, int]:
    """As many rows at once as an expert has on average. All fit into the registers, and into the 99 KiB of shared
    memory that the smallest of GPUs has."""
    at_once = min(max(1 << (rows - 1).bit_length(), 16), 128)
    if dtype == torch.float32:
        most, blocks = 32, {"BLOCK_R": min(at_once, 64), "BLOCK_O": 64, "num_warps": 4}
    elif at_once < 64:
        most, blocks = 128, {"BLOCK_R": at_once, "BLOCK_O": 64, "num_warps": 4}
    else:
        most, blocks = 64, {"BLOCK_R": at_once, "BLOCK_O": 128, "num_warps": 8}
    return {**blocks, "BLOCK_I": min(_power_in(group or inputs), most)}


def _power_in(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n
