"""The compiled kernels as functions of tensors, and what each of them takes.

torch reads a matrix at half of the memory's rate or less where one row is multiplied with it, which is what decoding
consists of, and every small step between two products costs it microseconds.

Shapes: N rows, I inputs, O outputs; H heads, C head_dim, B rows of a batch, K key heads, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama4.cache.formats import Format, Int4, Unquantized
from llama4.config import CACHE_BLOCK
from llama4.kernels import abi, build
from llama4.kernels.abi import INTERLEAVE, MAX_GEMV_ROWS, MAX_HEAD_DIM, STRIP, Layout, Matrix

MIN_MATRIX = 1 << 18
"""Numbers from which a matrix is worth the call, and a model of such the building: smaller ones stay in the processor's
cache."""
MIN_WIDTH = 512
"""Numbers of a token from which the small steps between products are worth the call."""
MIN_ATTENTION = 1 << 28
"""Products of queries and keys from which attention is worth the call however narrow its heads."""


def takes_packed(x_NI: Tensor, format: str, scale: Tensor, outputs: int, group_size: int | None = None) -> bool:
    """Whether rows, in any number, go this way to a matrix of few bits."""
    return (
        scale.dtype in abi.SUFFIXES
        and scale.is_contiguous()
        and _takes_groups(format, group_size or 0)
        and _takes(x_NI, format)
        and (x_NI.shape[0] <= MAX_GEMV_ROWS or outputs % STRIP == 0)
    )


def _takes_groups(format: str, group_size: int) -> bool:
    """Whether that many inputs may share a scale; 0: all of a row."""
    if format != "int4":
        return group_size == 0
    return group_size in (32, 64) or (group_size > 0 and group_size % 128 == 0)


def takes_dense(x_NI: Tensor, weight: Tensor, most: int | None = MAX_GEMV_ROWS) -> bool:
    """Whether rows, so many at most, go this way to a matrix of their own dtype, as it lies in memory."""
    return (
        x_NI.dtype == weight.dtype
        and weight.numel() >= MIN_MATRIX
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and _takes(x_NI, abi.DTYPES.get(x_NI.dtype, ""))
        and weight.shape[1] % multiple_of(x_NI.dtype) == 0
        and (most is None or x_NI.shape[0] <= most)
    )


def _takes(x_NI: Tensor, format: str) -> bool:
    """Whether a kernel takes such rows and a matrix with rows of this format."""
    return (
        x_NI.shape[0] > 0
        and x_NI.is_cpu
        and x_NI.dtype in abi.SUFFIXES
        and x_NI.shape[1] % abi.INPUTS[format] == 0
        and not (x_NI.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and build.library() is not None
    )


def linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, [N, O]."""
    return _product(Layout.OUT_IN, x_NI, weight_OI, weight_OI.shape[0])


def project(x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """x W, [N, O]."""
    return _product(Layout.IN_OUT, x_NI, weight_IO, weight_IO.shape[1])


def linear_int8(x_NI: Tensor, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """x W^T, with int8 codes."""
    return _product(Layout.INT8, x_NI, codes_OI, codes_OI.shape[0], scale_O1)


def linear_fp8(x_NI: Tensor, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """x W^T, with bytes of e4m3; x is rounded to e4m3, too, with a scale per row."""
    return _product(Layout.FP8, x_NI, codes_OI, codes_OI.shape[0], scale_O1)


def linear_int4(x_NI: Tensor, packed: Tensor, scale_OG: Tensor, group_size: int) -> Tensor:
    """x W^T, with eight codes to an int32, [O, I / 8], and scales for groups of 32, 64 or multiples of 128, both in
    sixteens."""
    return _product(Layout.INT4, x_NI, packed, packed.shape[0], scale_OG, group_size)


def reads_interleaved16(outputs: int, inputs: int, group_size: int) -> bool:
    """Whether a matrix of four bits can be had in the order in which it is read fastest."""
    fits = outputs % INTERLEAVE == 0 and inputs % abi.INPUTS["int4"] == 0
    return fits and _takes_groups("int4", group_size) and build.library() is not None


def interleaved16(part: Tensor, together: int) -> Tensor:
    """Rows [..., O, n], so many numbers of a row together: of sixteen rows the first, of the same the next, ..., a view
    [..., O / 16, n / together, 16, together]. Of packed int4 words four go together; of scales each is alone."""
    return part.unflatten(-1, (-1, together)).unflatten(-3, (-1, INTERLEAVE)).transpose(-3, -2)


def deinterleaved16(part: Tensor, together: int) -> Tensor:
    """The inverse, of what lies in this order as [..., O, n]; a copy."""
    *rows, outputs, count = part.shape
    lying = part.view(*rows, outputs // INTERLEAVE, count // together, INTERLEAVE, together)
    return lying.transpose(-3, -2).reshape(part.shape)


def _product(
    kind: int, x_NI: Tensor, weight: Tensor, outputs: int, scale: Tensor | None = None, group_size: int = 0
) -> Tensor:
    x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    y_NO = x_NI.new_empty(rows, outputs)
    is_wide = scale is not None and scale.dtype == torch.float32
    _run("linear", x_NI, x_NI, rows, inputs, outputs, kind, weight, scale, int(is_wide), group_size, y_NO)
    return y_NO


def in_out(weight_EIO: Tensor, dtype: torch.dtype) -> Matrix | None:
    """Experts in x out for rows of a dtype; None if these are not read this way."""
    _, inputs, outputs = weight_EIO.shape
    is_trained = torch.is_grad_enabled() and weight_EIO.requires_grad
    if is_trained or weight_EIO.dtype != dtype or dtype not in abi.SUFFIXES or not _have_addresses(weight_EIO):
        return None
    if inputs % 16 or outputs % multiple_of(dtype):
        return None
    step = inputs * outputs * weight_EIO.element_size()
    return Matrix(w=weight_EIO.data_ptr(), kind=Layout.IN_OUT, I=inputs, O=outputs, step=step)


def packed(format: str, codes: Tensor, scale: Tensor, outputs: int, inputs: int, group_size: int) -> Matrix | None:
    """A matrix of few bits, out x in, or several; None if it is not read this way."""
    if scale.dtype not in abi.SUFFIXES or not _have_addresses(codes, scale):
        return None
    if inputs % multiple_of(format) or not _takes_groups(format, group_size):
        return None
    return Matrix(
        w=codes.data_ptr(),
        scales=scale.data_ptr(),
        wide=scale.dtype == torch.float32,
        kind=abi.QUANTIZED[format],
        group=group_size,
        I=inputs,
        O=outputs,
        step=codes.stride(0) * codes.element_size() if codes.ndim == 3 else 0,
        scale_step=scale.stride(0) * scale.element_size() if scale.ndim == 3 else 0,
    )


def _have_addresses(*parts: Tensor) -> bool:
    """Whether tensors can be described by where they begin."""
    return not torch.compiler.is_compiling() and all(part.is_cpu and part.is_contiguous() for part in parts)


def experts(
    x_ND: Tensor, num_tokens_per_expert_E: Tensor, gate_up: Matrix | None, down: Matrix | None
) -> Tensor | None:
    """down(silu(gate(x)) * up(x)) of rows sorted by expert, [N, D]; None if this does not go this way."""
    if gate_up is None or down is None or x_ND.dtype not in abi.SUFFIXES or not _takes(x_ND, abi.DTYPES[x_ND.dtype]):
        return None
    if any(matrix.O % STRIP or matrix.I * matrix.O < MIN_MATRIX for matrix in (gate_up, down)):
        return None
    x_ND, counts_E = x_ND.contiguous(), num_tokens_per_expert_E.contiguous()
    assert x_ND.shape[1] == gate_up.I == down.O and gate_up.O == 2 * down.I
    assert counts_E.dtype == torch.int64 and counts_E.sum() == len(x_ND)
    y_ND = torch.empty_like(x_ND)
    _run("experts", x_ND, gate_up, down, counts_E, len(counts_E), x_ND, y_ND)
    return y_ND


def rounds(weight_OI: Tensor, group_size: int) -> bool:
    """Whether a matrix is rounded to four bits this way."""
    return (
        weight_OI.numel() >= MIN_MATRIX
        and weight_OI.is_cpu
        and weight_OI.dtype in abi.SUFFIXES
        and group_size % 16 == 0
        and weight_OI.shape[-1] % group_size == 0
        and build.library() is not None
    )


def quantize_int4(weight_OI: Tensor, group_size: int, ranges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Codes, eight to an int32, [O, I / 8], and scales of groups, [O, I / group_size], in the dtype of the matrix. The
    ranges to choose from are in parts of a group's largest weight."""
    weight_OI = weight_OI.detach().contiguous()
    outputs, inputs = weight_OI.shape
    packed = weight_OI.new_empty(outputs, inputs // 8, dtype=torch.int32)
    scale = weight_OI.new_empty(outputs, inputs // group_size)
    tried = torch.tensor(ranges, dtype=torch.float32)
    _run("quantize_int4", weight_OI, weight_OI, scale.numel(), group_size, tried, len(tried), packed, scale)
    return packed, scale


def usable(width: int, *tensors: Tensor) -> bool:
    """Whether what stands between the products can go this way: tokens wide enough to be worth the call, all on a CPU,
    in one of its dtypes, in sixteens, without gradients."""
    if width < MIN_WIDTH or torch.compiler.is_compiling():
        return False
    gradients = torch.is_grad_enabled()
    for t in tensors:
        if not t.is_cpu or t.dtype not in abi.SUFFIXES or t.shape[-1] % 16 or (gradients and t.requires_grad):
            return False
    return build.library() is not None


def heads_usable(q_NHC: Tensor, *others: Tensor) -> bool:
    """The same for heads: a kernel keeps one of them in 4 KiB."""
    return q_NHC.shape[2] <= MAX_HEAD_DIM and usable(q_NHC.shape[1] * q_NHC.shape[2], q_NHC, *others)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, from float32 to the dtype of the weight."""
    x, D = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x, dtype=weight_D.dtype)
    _run("rms_norm", weight_D, x, x.numel() // D, D, weight_D, eps, y)
    return y


def apply_rope(x_NHC: Tensor, rotation_NC: Tensor | None, eps: float | None, factors_N: Tensor | None) -> Tensor:
    """Heads, turned by unit complex numbers, normalised, multiplied by factors; each if given."""
    N, H, C = x_NHC.shape
    if x_NHC.stride()[1:] != (C, 1):
        x_NHC = x_NHC.contiguous()
    y_NHC = x_NHC.new_empty(N, H, C)
    rest = rotation_NC, -1.0 if eps is None else eps, factors_N, y_NHC
    _run("apply_rope", x_NHC, x_NHC, x_NHC.stride(0), N, H, C, *rest)
    return y_NHC


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) * up; both may be halves of one tensor."""
    if gate_NF.stride(1) != 1 or gate_NF.stride() != up_NF.stride():
        gate_NF, up_NF = gate_NF.contiguous(), up_NF.contiguous()
    y_NF = gate_NF.new_empty(gate_NF.shape)
    _run("swiglu", gate_NF, gate_NF, up_NF, *gate_NF.shape, gate_NF.stride(0), y_NF)
    return y_NF


def chooses(logits_BV: Tensor) -> bool:
    """Whether the greedy tokens can be found this way."""
    return (
        logits_BV.is_cpu
        and logits_BV.dtype in abi.SUFFIXES
        and logits_BV.numel() >= MIN_WIDTH
        and build.library() is not None
    )


def greedy_token(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each row's largest, of equals the lowest, and its log_softmax in float32, [B] each; torch takes
    six times as long for the index alone, in bfloat16."""
    logits_BV = logits_BV.contiguous()
    B, V = logits_BV.shape
    ids_B = logits_BV.new_empty(B, dtype=torch.int64)
    logprobs_B = logits_BV.new_empty(B, dtype=torch.float32)
    _run("greedy_token", logits_BV, logits_BV, B, V, ids_B, logprobs_B)
    return ids_B, logprobs_B


def reads(format: Format, dtype: torch.dtype, C: int) -> bool:
    """Whether kernels for a dtype read heads of C numbers in a format of the cache."""
    known = format.dtype == dtype if isinstance(format, Unquantized) else not isinstance(format, Int4) or C % 32 == 0
    return known and C % 16 == 0 and C <= MAX_HEAD_DIM


def attention_usable(q_NHC: Tensor, keys: int, format: Format) -> bool:
    """Whether attention can go this way, over so many keys in a format."""
    N, H, C = q_NHC.shape
    is_worth_it = max(N, CACHE_BLOCK) * keys * H * C >= MIN_ATTENTION or H * C >= MIN_WIDTH
    return is_worth_it and reads(format, q_NHC.dtype, C) and usable(MIN_WIDTH, q_NHC)


def attend(q_BHC: Tensor, table: Tensor, lengths_B: Tensor, heads: int, format: int) -> Tensor:
    """One query per row and head against the first `lengths` tokens of its row: softmax(q K^T / sqrt(C)) V. The table
    has the addresses of the blocks of each row, [B, blocks]."""
    B, H, C = q_BHC.shape
    q_BHC = q_BHC.contiguous()
    y_BHC = torch.empty_like(q_BHC)
    _run("attend", q_BHC, q_BHC, table, table.shape[1], lengths_B, B, H, heads, C, format, y_BHC)
    return y_BHC


def attend_causal(q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, blocks: Tensor | None, past: int, format: int) -> Tensor:
    """New tokens that see each other causally, and before them `past` tokens in blocks of these addresses."""
    N, H, C = q_NHC.shape
    q_NHC, k_NKC, v_NKC = q_NHC.contiguous(), k_NKC.contiguous(), v_NKC.contiguous()
    y_NHC = torch.empty_like(q_NHC)
    _run("attend_causal", q_NHC, q_NHC, k_NKC, v_NKC, N, blocks, past, H, k_NKC.shape[1], C, format, y_NHC)
    return y_NHC


def _run(name: str, like: Tensor, *arguments: Tensor | Matrix | float | None) -> None:
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    build.function(name, like.dtype)(*given)


def multiple_of(format: str | torch.dtype) -> int:
    """Of what the length of a matrix's rows must be a multiple, for a kernel to read it."""
    return abi.INPUTS[abi.DTYPES[format] if isinstance(format, torch.dtype) else format]
