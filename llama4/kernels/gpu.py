"""The Triton kernels for what stands between matrix products, as functions of tensors, one launch each.

As with `kernels.cpu`: when a kernel takes its arguments is decided in `llama4.ops`, which is what to call, and sizes
are not compared here. Triton is imported at the first launch. No launch waits for the device, and none depends on what
a tensor holds.

Shapes: N rows, D hidden size, F width of an MLP, H query heads, K key/value heads, C head_dim, k experts per token,
R = N * k routed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_WIDTH = 1 << 15
"""Widest rows that a program holds."""
BLOCK = 1024
"""Elements that a program computes where it does not need all of a row."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of the weight."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=weight_D.dtype)
    _rms_norm(x, None, None, None, weight_D, eps, None, y)
    return y


def add_rms_norm(
    x_ND: Tensor,
    delta_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    routed_RD: Tensor | None = None,
    rows_Nk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of the residual stream and the norm behind it.

    Args:
        x_ND: the residual.
        delta_ND: what a layer adds to it.
        weight_D: of the norm.
        eps: of the norm.
        routed_RD: outputs of experts, which are added to `delta_ND` first; see `combine`.
        rows_Nk: where those of each token are.

    Returns:
        x + delta in float32, and `rms_norm` of it.
    """
    x_ND, delta_ND = x_ND.contiguous(), delta_ND.contiguous()
    sum_ND = torch.empty_like(x_ND, dtype=torch.float32)
    y_ND = torch.empty_like(x_ND, dtype=weight_D.dtype)
    _rms_norm(x_ND, delta_ND, routed_RD, rows_Nk, weight_D, eps, sum_ND, y_ND)
    return sum_ND, y_ND


def _rms_norm(
    x: Tensor,
    delta_ND: Tensor | None,
    routed_RD: Tensor | None,
    rows_Nk: Tensor | None,
    weight_D: Tensor,
    eps: float,
    sum_ND: Tensor | None,
    y: Tensor,
) -> None:
    from llama4.kernels.triton import elementwise

    D = x.shape[-1]
    k = rows_Nk.shape[1] if rows_Nk is not None else 0
    tensors = x, delta_ND, routed_RD, rows_Nk, weight_D, sum_ND, y
    _launch(elementwise.rms_norm, (x.numel() // D,), x, *tensors, eps, k=k, D=D, **_whole_row(D))


def apply_rope(
    q_NHC: Tensor,
    k_NKC: Tensor,
    rotation: Tensor | None,
    qk_norm_eps: float | None,
    temperature_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as `ops.rope.apply_rope` makes them, new and contiguous; those to which nothing is done as they
    are. Heads may be views into wider rows.

    Args:
        rotation: complex64, [P, C / 2]: token n has that of n % P.
    """
    from llama4.kernels.triton import elementwise

    turns_keys = rotation is not None or qk_norm_eps is not None
    if not turns_keys and temperature_N is None:
        return q_NHC, k_NKC
    q_NHC, k_NKC = (x if x.stride(2) == 1 else x.contiguous() for x in (q_NHC, k_NKC))
    (N, H, C), K = q_NHC.shape, k_NKC.shape[1]
    new_q_NHC = q_NHC.new_empty(q_NHC.shape)
    new_k_NKC = k_NKC.new_empty(k_NKC.shape) if turns_keys else k_NKC
    block_c = _next_power(C)
    block_h = max(1, min(BLOCK // block_c, _next_power(max(H, K))))
    blocks = -(-H // block_h) + (-(-K // block_h) if turns_keys else 0)
    parts = torch.view_as_real(rotation.contiguous()) if rotation is not None else None
    tensors = q_NHC, k_NKC, parts, temperature_N, new_q_NHC, new_k_NKC
    numbers = len(rotation) if rotation is not None else 1, qk_norm_eps, *q_NHC.stride()[:2], *k_NKC.stride()[:2]
    sizes = {"H": H, "K": K, "C": C, "BLOCK_H": block_h, "BLOCK_C": block_c}
    _launch(elementwise.apply_rope, (N, blocks), q_NHC, *tensors, *numbers, **sizes)
    return new_q_NHC, new_k_NKC


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) * up; both may be halves of one tensor."""
    from llama4.kernels.triton import elementwise

    gate_NF, up_NF = (x if x.stride(1) == 1 else x.contiguous() for x in (gate_NF, up_NF))
    N, F = gate_NF.shape
    y_NF = gate_NF.new_empty(N, F)
    block = min(BLOCK, _next_power(F))
    grid = N, -(-F // block)
    _launch(elementwise.swiglu, grid, y_NF, gate_NF, up_NF, y_NF, gate_NF.stride(0), up_NF.stride(0), F, BLOCK=block)
    return y_NF


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Tensor | float | None, **sizes: int) -> None:
    """On the device of `like`; nothing where there is nothing to compute."""
    if all(grid):
        with torch.cuda.device_of(like):
            kernel[grid](*arguments, **sizes)


def _whole_row(width: int) -> dict[str, int]:
    """Sixteen elements for each thread of a program that holds a row, as far as there are threads."""
    block = _next_power(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _next_power(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()
