"""The compiled kernels as functions of tensors, one call each.

When a kernel takes its arguments, and when it pays, is decided in `llama4.ops`, which is what to call. A kernel
compares sizes with each other and refuses what does not fit (`abi.KernelArgumentError`); but tensors go to it as
addresses, so one that is smaller than its sizes say is read beyond its end.

Shapes: N rows, I inputs, O outputs, G groups of inputs that share a scale, R rows sorted by expert, D hidden size,
H query heads, K key/value heads, C head_dim, B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array

import torch
from torch import Tensor

from llama4.kernels import abi, loader, threads
from llama4.kernels.abi import Matrix, MatrixLayout


def linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, [N, O]."""
    return _product(MatrixLayout.OUT_IN, x_NI, weight_OI, weight_OI.shape[0])


def linear_in_out(x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """x W, [N, O]."""
    return _product(MatrixLayout.IN_OUT, x_NI, weight_IO, weight_IO.shape[1])


def linear_quantized(
    kind: str, x_NI: Tensor, values: Tensor, scale_OG: Tensor | None = None, group_size: int = 0
) -> Tensor:
    """x W^T, [N, O], with a matrix in a format that the library has: "int8", [O, I]; "fp8", bytes of e4m3, for
    which x is rounded as well; "int4", packed [O, I / 8], and scales of groups, both interleaved; blocks of GGUF, bytes
    that hold their scales."""
    layout = loader.loaded().weight_formats[kind].number
    return _product(layout, x_NI, values, values.shape[0], scale_OG, group_size)


def _product(
    layout: int, x_NI: Tensor, weight: Tensor, outputs: int, scale: Tensor | None = None, group_size: int = 0
) -> Tensor:
    x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    y_NO = x_NI.new_empty(rows, outputs)
    has_float32_scales = scale is not None and scale.dtype == torch.float32
    _run("linear", x_NI, x_NI, rows, inputs, outputs, layout, weight, scale, int(has_float32_scales), group_size, y_NO)
    return y_NO


def experts(x_RD: Tensor, num_tokens_per_expert_E: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """down(silu(gate(x)) * up(x)), [R, D]."""
    x_RD, counts_E = x_RD.contiguous(), num_tokens_per_expert_E.contiguous()
    y_RD = torch.empty_like(x_RD)
    _run("experts", x_RD, gate_up, down, counts_E, len(counts_E), x_RD, y_RD)
    return y_RD


def quantize_int4(weight_OI: Tensor, group_size: int, ranges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Packed values, eight to an int32, [O, I / 8], and scales [O, G] in the dtype of the matrix."""
    weight_OI = weight_OI.detach().contiguous()
    outputs, inputs = weight_OI.shape
    packed = weight_OI.new_empty(outputs, inputs // 8, dtype=torch.int32)
    scale_OG = weight_OI.new_empty(outputs, inputs // group_size)
    tried = torch.tensor(ranges, dtype=torch.float32)
    _run("quantize_int4", weight_OI, weight_OI, scale_OG.numel(), group_size, tried, len(tried), packed, scale_OG)
    return packed, scale_OG


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, from float32 to the dtype of the weight."""
    x, D = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x, dtype=weight_D.dtype)
    _run("rms_norm", weight_D, x, x.numel() // D, D, weight_D, eps, y)
    return y


def apply_rope(x_NHC: Tensor, rotation: Tensor | None, eps: float | None, factor_N: Tensor | None) -> Tensor:
    """Heads times rotation [N, C / 2], complex64; then normalised; then times a factor; each if given."""
    N, H, C = x_NHC.shape
    if x_NHC.stride()[1:] != (C, 1):
        x_NHC = x_NHC.contiguous()
    y_NHC = x_NHC.new_empty(N, H, C)
    steps = rotation, -1.0 if eps is None else eps, factor_N
    _run("apply_rope", x_NHC, x_NHC, x_NHC.stride(0), N, H, C, *steps, y_NHC)
    return y_NHC


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) * up; both may be halves of one tensor."""
    if gate_NF.stride(1) != 1 or gate_NF.stride() != up_NF.stride():
        gate_NF, up_NF = gate_NF.contiguous(), up_NF.contiguous()
    y_NF = gate_NF.new_empty(gate_NF.shape)
    _run("swiglu", gate_NF, gate_NF, up_NF, *gate_NF.shape, gate_NF.stride(0), y_NF)
    return y_NF


def greedy_token(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each row's largest, the lowest on ties, and its log_softmax in float32, [B] each."""
    logits_BV = logits_BV.contiguous()
    B, V = logits_BV.shape
    ids_B = logits_BV.new_empty(B, dtype=torch.int64)
    logprobs_B = logits_BV.new_empty(B, dtype=torch.float32)
    _run("greedy_token", logits_BV, logits_BV, B, V, ids_B, logprobs_B)
    return ids_B, logprobs_B


def draw_token(logits_BV: Tensor, draws: Sequence[tuple[float, ...]]) -> list[tuple[int, float]]:
    """For each draw, the first fields of an `abi.Draw`, the token and its log_softmax in float32."""
    logits_BV = logits_BV.contiguous()
    given = (abi.Draw * len(draws))(*(abi.Draw(*draw) for draw in draws))
    _run("draw_token", logits_BV, logits_BV, *logits_BV.shape, given, len(draws))
    return [(draw.id, draw.logprob) for draw in given]


def attend(q_BHC: Tensor, block_table: Tensor, lengths_B: Tensor, heads: int, format: str) -> Tensor:
    """One query per sequence and head against the first `lengths` keys in blocks of these addresses, [B, blocks], in a
    format of the cache."""
    number = loader.loaded().cache_formats[format].number
    B, H, C = q_BHC.shape
    q_BHC = q_BHC.contiguous()
    y_BHC = torch.empty_like(q_BHC)
    _run("attend", q_BHC, q_BHC, block_table, block_table.shape[1], lengths_B, B, H, heads, C, number, y_BHC)
    return y_BHC


def attend_causal(q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, blocks: Tensor | None, past: int, format: str) -> Tensor:
    """New tokens that see each other causally, and before them `past` tokens in blocks of these addresses. Whatever a
    token holds, NaN and infinity too, those before it keep their bits."""
    number = loader.loaded().cache_formats[format].number
    N, H, C = q_NHC.shape
    q_NHC, k_NKC, v_NKC = q_NHC.contiguous(), k_NKC.contiguous(), v_NKC.contiguous()
    y_NHC = torch.empty_like(q_NHC)
    sizes = len(blocks) if blocks is not None else 0, past, H, k_NKC.shape[1], C
    _run("attend_causal", q_NHC, q_NHC, k_NKC, v_NKC, N, blocks, *sizes, number, y_NHC)
    return y_NHC


def _run(name: str, like: Tensor, *arguments: Tensor | Matrix | Array[abi.Draw] | float | None) -> None:
    """The kernel for rows of the dtype of `like`; tensors go by their addresses."""
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    abi.check(loader.function(name, like.dtype)(threads.count(), *given))
