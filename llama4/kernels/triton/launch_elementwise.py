"""Launches the kernels of `elementwise`, one for each function of tensors.

As with `kernels.cpu`: when a kernel takes its arguments is decided in `llama4.ops`, which is what to call, and sizes
are not compared here. No launch waits for the device, and none depends on what a tensor holds.

Shapes: N rows, I inputs, D hidden size, F width of an MLP, H query heads, K key/value heads, C head_dim, k experts per
token, R = N * k routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.kernels.triton import common


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
        routed_RD: outputs of experts, which are added to `delta_ND` first; see `launch_routing.combine`.
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
    common.launch(elementwise.rms_norm, (x.numel() // D,), x, *tensors, eps, k=k, D=D, **common.whole_row(D))


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

    changes_keys = rotation is not None or qk_norm_eps is not None
    if not changes_keys and temperature_N is None:
        return q_NHC, k_NKC
    q_NHC, k_NKC = (x if x.stride(2) == 1 else x.contiguous() for x in (q_NHC, k_NKC))
    (N, H, C), K = q_NHC.shape, k_NKC.shape[1]
    new_q_NHC = q_NHC.new_empty(q_NHC.shape)
    new_k_NKC = k_NKC.new_empty(k_NKC.shape) if changes_keys else k_NKC
    block_c = common.next_power_of_two(C)
    block_h = max(1, min(common.BLOCK // block_c, common.next_power_of_two(max(H, K))))
    blocks = -(-H // block_h) + (-(-K // block_h) if changes_keys else 0)
    rotation_parts = torch.view_as_real(rotation.contiguous()) if rotation is not None else None
    tensors = q_NHC, k_NKC, rotation_parts, temperature_N, new_q_NHC, new_k_NKC
    numbers = len(rotation) if rotation is not None else 1, qk_norm_eps, *q_NHC.stride()[:2], *k_NKC.stride()[:2]
    sizes = {"H": H, "K": K, "C": C, "BLOCK_H": block_h, "BLOCK_C": block_c}
    common.launch(elementwise.apply_rope, (N, blocks), q_NHC, *tensors, *numbers, **sizes)
    return new_q_NHC, new_k_NKC


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) * up; both may be halves of one tensor."""
    from llama4.kernels.triton import elementwise

    gate_NF, up_NF = (x if x.stride(1) == 1 else x.contiguous() for x in (gate_NF, up_NF))
    N, F = gate_NF.shape
    y_NF = gate_NF.new_empty(N, F)
    block = min(common.BLOCK, common.next_power_of_two(F))
    tensors = gate_NF, up_NF, y_NF
    numbers = gate_NF.stride(0), up_NF.stride(0), F
    common.launch(elementwise.swiglu, (N, -(-F // block)), y_NF, *tensors, *numbers, BLOCK=block)
    return y_NF


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and their float32 scales [..., 1], to the bit those of `ops.fp8.to_fp8`; NaN where that is."""
    from llama4.kernels.triton import elementwise

    x, I = x.contiguous(), x.shape[-1]  # noqa: E741
    values, scales = _empty_fp8(x)
    sizes = {"I": I, "BLOCK": min(common.BLOCK, common.next_power_of_two(I)), "HAS_E4M3": common.has_e4m3(x.device)}
    common.launch(elementwise.to_fp8, (scales.numel(),), x, x, values, scales, **sizes)
    return values.view(torch.float8_e4m3fn), scales


def swiglu_to_fp8(gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    """`to_fp8` of `swiglu`, to the bit, where F is at most `common.MAX_WIDTH`."""
    from llama4.kernels.triton import elementwise

    gate_NF, up_NF = (x if x.stride(1) == 1 else x.contiguous() for x in (gate_NF, up_NF))
    F = gate_NF.shape[1]
    values_NF, scales_N1 = _empty_fp8(gate_NF)
    tensors, strides = (gate_NF, up_NF, values_NF, scales_N1), (gate_NF.stride(0), up_NF.stride(0))
    sizes = {"F": F, "HAS_E4M3": common.has_e4m3(gate_NF.device), **common.whole_row(F)}
    common.launch(elementwise.swiglu_to_fp8, (len(gate_NF),), gate_NF, *tensors, *strides, **sizes)
    return values_NF.view(torch.float8_e4m3fn), scales_N1


def _empty_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of x, and a scale for each row."""
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
