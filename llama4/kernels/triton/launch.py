"""Launches the kernels of `quantized` for products with quantized matrices on a GPU.

Triton comes with torch's builds for CUDA. It is imported at the first product; where it cannot run, torch's own
operations serve.

Shapes: R rows, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_GEMV_ROWS = 8
"""Most rows, of all experts together, for `gemv`, which reads an expert's matrix once per row. Measured on an H100,
like the sizes of blocks below."""
KINDS = ("int4", "int8", "fp8")
_EXPONENT = 0x4B000000
"""The bits of 2^23 in float32."""
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
    if len(x_RI) <= MAX_GEMV_ROWS:
        return _gemv(kind, x_RI, [(values, scales)], counts_E, x_scales_R, dtype)
    from llama4.kernels.triton import quantized

    values, scales, x_RI = values.contiguous(), scales.contiguous(), x_RI.contiguous()
    (rows, inputs), outputs, E = x_RI.shape, scales.shape[-2], 1 if counts_E is None else len(counts_E)
    y_RO = torch.empty(rows, outputs, dtype=dtype or x_RI.dtype, device=x_RI.device)
    group, most = _group(inputs, scales), min(E, rows)
    blocks = _gemm_blocks(x_RI, rows, E, group)
    tiles = most + (rows - most) // blocks["BLOCK_R"]  # `most` experts have one row more than whole tiles
    values = values if kind == "int8" else values.view(torch.uint8)
    with torch.cuda.device_of(x_RI):
        quantized.grouped_gemm[tiles * -(-outputs // blocks["BLOCK_O"]),](
            *(x_RI, values, scales, x_scales_R, counts_E, y_RO),
            *(rows, outputs, inputs),
            **{"E": E, "kind": kind, "group": group, "enable_fp_fusion": True, **blocks},
        )
    return y_RO


def products(
    kind: str,
    x_RI: Tensor,
    matrices: Sequence[tuple[Tensor, Tensor]],
    *,
    x_scales_R: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`product` with each of up to three matrices, [R, O + O + O]: in one launch where rows are few.

    Args:
        matrices: values and scales of each.
    """
    if len(x_RI) <= MAX_GEMV_ROWS:
        return _gemv(kind, x_RI, matrices, None, x_scales_R, dtype)
    return torch.cat([product(kind, x_RI, *matrix, x_scales_R=x_scales_R, dtype=dtype) for matrix in matrices], dim=1)


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
    early = _capability(x_RI.device) >= 90
    blocks = _gemv_blocks(x_RI.device, kind, rows if counts_E is None else 1, outputs, inputs)
    grid = -(-rows // blocks["BLOCK_R"]), sum(-(-o // blocks["BLOCK_O"]) for o in outputs)
    sizes = {"E": E, "kind": kind, "group": _group(inputs, matrices[0][1]), "EARLY": early, **blocks}
    with torch.cuda.device_of(x_RI):
        quantized.gemv[grid](
            *(x_RI, *parts[:2], x_scales_R, counts_E, y_RO, *parts[2:]),
            *(_EXPONENT, rows, *outputs, inputs),
            **{**sizes, "launch_pdl": early, "enable_fp_fusion": True},
        )
    return y_RO


def _group(inputs: int, scales: Tensor) -> int:
    """Inputs that share a scale; 0 if all do."""
    groups = scales.shape[-1]
    return inputs // groups if groups > 1 else 0


def _capability(device: torch.device) -> int:
    """Compute capability of the GPU that kernels are compiled for, such as 90; 0 if there is none."""
    if device.type == "cpu":
        return 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    import triton

    return int(triton.runtime.driver.active.get_current_target().arch)


def _gemv_blocks(device: torch.device, kind: str, rows: int, outputs: Sequence[int], inputs: int) -> dict[str, int]:
    """Few outputs are spread over more threads. In Triton's interpreter, where a large block costs what a small one
    does, blocks are large."""
    threads, is_small = inputs // (32 if kind == "int4" else 16), sum(outputs) < 8192
    warps = 2 if is_small and threads % 64 == 0 else 1
    most = 32 if device.type == "cpu" else 2 if is_small and warps == 1 and rows == 1 else 4
    return {
        "BLOCK_R": 1 << (min(rows, 4) - 1).bit_length(),
        "BLOCK_O": min(most, 1 << (min(o for o in outputs if o).bit_length() - 1)),
        "THREADS": 32 * warps,
        "num_warps": warps,
    }


def _gemm_blocks(x_RI: Tensor, rows: int, E: int, group: int) -> dict[str, int]:
    """As many rows at once as an expert has on average. All fit into the registers, and before Hopper into the 99 KiB
    of shared memory that the smallest of GPUs has. Where programs are few, each has more loads under way."""
    at_once = min(max(1 << (-(-rows // E) - 1).bit_length(), 16), 128)
    stages = 3 if _capability(x_RI.device) == 90 else 2
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
