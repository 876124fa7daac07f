"""The Triton kernels for what stands between matrix products, as functions of tensors, one launch each.

As with `kernels.cpu`: when a kernel takes its arguments is decided in `llama4.ops`, which is what to call, and sizes
are not compared here. Triton is imported at the first launch. No launch waits for the device, and none depends on what
a tensor holds.

Shapes: N rows, I inputs, D hidden size, F width of an MLP, H query heads, K key/value heads, C head_dim, E experts,
k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_WIDTH = 1 << 15
"""Widest rows that a program holds."""
BLOCK = 1024
"""Elements that a program computes where it does not need all of a row."""
MAX_TOP_1 = 64
"""Most tokens of which each program of `dispatch_top_1` looks at all."""

Dispatched = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens times scores, sorted by expert, [R, D]; rows of each expert [E]; the token of each row [R]; the rows of each
token [N, k]; see `ops.routing.Dispatched`."""


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


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and their float32 scales [..., 1], to the bit those of `ops.fp8.to_fp8`."""
    from llama4.kernels.triton import elementwise

    x, I = x.contiguous(), x.shape[-1]  # noqa: E741
    values = torch.empty_like(x, dtype=torch.uint8)
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _launch(elementwise.to_fp8, (scales.numel(),), x, x, values, scales, I=I, **_whole_row(I))
    return values.view(torch.float8_e4m3fn), scales


def router_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32, [N, E], for few tokens: the weights are read for each of them."""
    from llama4.kernels.triton import routing

    x_ND, weight_ED = x_ND.contiguous(), weight_ED.contiguous()
    (N, D), E = x_ND.shape, len(weight_ED)
    logits_NE = x_ND.new_empty(N, E, dtype=torch.float32)
    _launch(routing.router_logits, (N, E), x_ND, x_ND, weight_ED, logits_NE, E=E, D=D, **_whole_row(D))
    return logits_NE


def dispatch(x_ND: Tensor, scores_Nk: Tensor, experts_Nk: Tensor, num_experts: int) -> Dispatched:
    """Tokens to the experts chosen for them, int64."""
    from llama4.kernels.triton import routing

    x_ND, scores_Nk, experts_Nk = x_ND.contiguous(), scores_Nk.contiguous(), experts_Nk.contiguous()
    (N, k), D = experts_Nk.shape, x_ND.shape[1]
    x_RD, counts_E, tokens_R, rows_Nk = dispatched = _empty_dispatched(x_ND, N, k, num_experts)
    numbers = experts_Nk, tokens_R, rows_Nk, counts_E, N * k
    block = MAX_TOP_1 if N * k <= MAX_TOP_1 else BLOCK
    _launch(routing.sort_by_expert, (num_experts,), x_ND, *numbers, k=k, BLOCK=block)
    tensors = x_ND, scores_Nk, rows_Nk, x_RD
    _launch(routing.scatter_scaled, (N * k, -(-D // BLOCK)), x_ND, *tensors, D, k=k, BLOCK=BLOCK)
    return dispatched


def dispatch_top_1(x_ND: Tensor, logits_NE: Tensor) -> Dispatched:
    """At most `MAX_TOP_1` tokens to the expert of the largest logit, the first on ties, with its sigmoid as the
    score."""
    from llama4.kernels.triton import routing

    x_ND, logits_NE = x_ND.contiguous(), logits_NE.contiguous()
    (N, D), E = x_ND.shape, logits_NE.shape[1]
    x_RD, counts_E, tokens_R, rows_N1 = dispatched = _empty_dispatched(x_ND, N, 1, E)
    if not N:
        counts_E.zero_()
        return dispatched
    sizes = {"E": E, "BLOCK_N": _next_power(N), "BLOCK_E": _next_power(E), "BLOCK": BLOCK}
    tensors = x_ND, logits_NE, x_RD, counts_E, tokens_R, rows_N1
    _launch(routing.dispatch_top_1, (N, -(-D // BLOCK)), x_ND, *tensors, N, D, **sizes)
    return dispatched


def combine(routed_RD: Tensor, rows_Nk: Tensor, out_ND: Tensor) -> Tensor:
    """out + the rows of each token, in float32, [N, D]."""
    from llama4.kernels.triton import routing

    routed_RD, rows_Nk, out_ND = routed_RD.contiguous(), rows_Nk.contiguous(), out_ND.contiguous()
    (N, k), D = rows_Nk.shape, out_ND.shape[1]
    sum_ND = out_ND.new_empty(N, D, dtype=torch.float32)
    tensors = routed_RD, rows_Nk, out_ND, sum_ND
    _launch(routing.combine, (N, -(-D // BLOCK)), out_ND, *tensors, D, k=k, BLOCK=BLOCK)
    return sum_ND


def _empty_dispatched(x_ND: Tensor, N: int, k: int, E: int) -> Dispatched:
    x_RD, counts_E = x_ND.new_empty(N * k, x_ND.shape[1]), x_ND.new_empty(E, dtype=torch.int64)
    return x_RD, counts_E, x_ND.new_empty(N * k, dtype=torch.int64), x_ND.new_empty(N, k, dtype=torch.int64)


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
