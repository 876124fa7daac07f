"""Triton kernels for what stands between matrix products: norm, rotation of heads, SwiGLU, rounding to e4m3.

In torch each is several kernels, and each of those reads and writes all of its tensor. Here one kernel reads the inputs
once, computes in float32 and writes the result once. A program has one row, or a block of one, so any number of rows
takes any number of programs and nothing of the result depends on it.

Shapes: N tokens (rows), I inputs, D hidden size, F width of an MLP, H query heads, K key/value heads, C head_dim, k
experts per token, R = N * k routed rows.
"""

# mypy: ignore-errors
# What is inside the kernels is Triton's language, for which there are no types.

import triton
import triton.language as tl

from llama4.kernels.triton.number_formats import e4m3_scale, largest_magnitude, magnitudes, scaled_to_e4m3


@triton.jit
def rms_norm(
    x_ND,
    delta_ND,
    routed_RD,
    rows_Nk,
    weight_D,
    sum_ND,
    y_ND,
    eps,
    k: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program n normalises row n: of x, or of x + delta, which is written to `sum_ND`; or of x + (delta + the rows of
    its experts)."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ND + n * D + d, mask=d < D, other=0).to(tl.float32)
    if delta_ND is not None:
        delta = tl.load(delta_ND + n * D + d, mask=d < D, other=0).to(tl.float32)
        if routed_RD is not None:
            for i in tl.static_range(k):
                row = tl.load(rows_Nk + n * k + i)
                delta += tl.load(routed_RD + row * D + d, mask=d < D, other=0).to(tl.float32)
        x += delta
        tl.store(sum_ND + n * D + d, x, mask=d < D)
    weight = tl.load(weight_D + d, mask=d < D, other=0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / D + eps) * weight
    tl.store(y_ND + n * D + d, y.to(y_ND.dtype.element_ty), mask=d < D)


@triton.jit
def apply_rope(
    q_NHC,
    k_NKC,
    rotations,
    factor_N,
    new_q_NHC,
    new_k_NKC,
    period,
    eps,
    q_stride_n,
    q_stride_h,
    k_stride_n,
    k_stride_h,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (n, b) rotates heads b * BLOCK_H, ... of token n; behind the blocks of queries come those of keys. Token
    n has the rotation n % period; the real and imaginary parts of a rotation alternate."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    rotation = None if rotations is None else rotations + n % period * C
    if block < query_blocks:
        factor = None if factor_N is None else tl.load(factor_N + n).to(tl.float32)
        x_HC, y_HC = q_NHC + n * q_stride_n, new_q_NHC + n * H * C
        rotate_heads(x_HC, q_stride_h, rotation, eps, factor, y_HC, block, H, C, BLOCK_H, BLOCK_C)
    else:
        x_HC, y_HC = k_NKC + n * k_stride_n, new_k_NKC + n * K * C
        rotate_heads(x_HC, k_stride_h, rotation, eps, None, y_HC, block - query_blocks, K, C, BLOCK_H, BLOCK_C)


@triton.jit
def rotate_heads(
    x_HC,
    stride_h,
    rotation,
    eps,
    factor,
    y_HC,
    block,
    H: tl.constexpr,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pairs times the rotation, then normalised, then times the factor; each if given."""
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    inside = (h < H)[:, None] & (c < C)[None, :]
    x = tl.load(x_HC + (h * stride_h)[:, None] + c[None, :], mask=inside, other=0).to(tl.float32)
    if rotation is not None:
        real, imaginary = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_C // 2, 2]))
        parts = tl.load(rotation + c, mask=c < C, other=0)
        cos, sin = tl.split(tl.reshape(parts, [1, BLOCK_C // 2, 2]))
        x = tl.interleave(real * cos - imaginary * sin, real * sin + imaginary * cos)
    if eps is not None:
        x *= tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    if factor is not None:
        x *= factor
    tl.store(y_HC + (h * C)[:, None] + c[None, :], x.to(y_HC.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(gate_NF, up_NF, y_NF, gate_stride, up_stride, F, BLOCK: tl.constexpr):
    """Program (n, b) computes elements b * BLOCK, ... of row n."""
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_NF + n * gate_stride + f, mask=f < F, other=0).to(tl.float32)
    up = tl.load(up_NF + n * up_stride + f, mask=f < F, other=0).to(tl.float32)
    tl.store(y_NF + n * F + f, gated(gate, up).to(y_NF.dtype.element_ty), mask=f < F)


@triton.jit
def gated(gate, up):
    """silu(gate) * up."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def to_fp8(
    x_NI,
    values_NI,
    scales_N,
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
    HAS_E4M3: tl.constexpr,
):
    """Program n rounds row n, divided by a scale with which its largest becomes 448. It reads the row twice, the second
    time from the cache: of a program that holds a row some threads are idle, but if it is a power of two wide."""
    n = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in tl.static_range(0, I, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_NI + n * I + i, mask=i < I, other=0).to(tl.float32)
        largest = tl.maximum(largest, magnitudes(x))
    scale = e4m3_scale(tl.max(largest, 0).to(tl.float32, bitcast=True))
    inverse = tl.div_rn(1.0, scale)
    for start in tl.static_range(0, I, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_NI + n * I + i, mask=i < I, other=0).to(tl.float32)
        tl.store(values_NI + n * I + i, scaled_to_e4m3(x, scale, inverse, HAS_E4M3), mask=i < I)
    tl.store(scales_N + n, scale)


@triton.jit
def swiglu_to_fp8(
    gate_NF,
    up_NF,
    values_NF,
    scales_N,
    gate_stride,
    up_stride,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_E4M3: tl.constexpr,
):
    """Program n computes row n of `swiglu` in the dtype of its inputs, and rounds it as `to_fp8` does."""
    n = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    gate = tl.load(gate_NF + n * gate_stride + f, mask=f < F, other=0).to(tl.float32)
    up = tl.load(up_NF + n * up_stride + f, mask=f < F, other=0).to(tl.float32)
    y = gated(gate, up).to(gate_NF.dtype.element_ty).to(tl.float32)
    scale = e4m3_scale(largest_magnitude(y))
    inverse = tl.div_rn(1.0, scale)
    tl.store(values_NF + n * F + f, scaled_to_e4m3(y, scale, inverse, HAS_E4M3), mask=f < F)
    tl.store(scales_N + n, scale)
