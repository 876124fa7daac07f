"""Two Triton kernels for y = x W^T, where W is one of E quantized matrices and the rows of x are sorted by expert.

Both read quantized values as a checkpoint stores them, convert them in registers and accumulate in float32. The values
are integers or e4m3, exact in every dtype that a product is computed in; scales are applied to sums, so no weight is
rounded.

- `gemv` is for decoding, where each byte of a matrix is read for one row and memory bandwidth is the limit. A program
  computes a few outputs of one row; neighbouring threads read neighbouring bytes; tensor cores are not used.
- `grouped_gemm` is for prompts, where a matrix is read once per tile of rows and arithmetic is the limit. A program
  computes a tile of outputs x rows of one expert on tensor cores. It computes (W x^T)^T: the weights are then the left
  operand, which Hopper's tensor cores take from registers, where the values were converted.

Only the device knows how many rows an expert has. So the grid has the size of the worst case, each program finds its
expert by summing the counts, and programs without one return. Nothing waits for the device, and a launch can be
replayed with other counts. Past the last output or row, the last one is read and nothing is stored; inputs come in
whole blocks.

Shapes: R rows, I inputs, O outputs, E experts, G groups of inputs that share a scale.
"""

# mypy: ignore-errors
# What is inside the kernels is Triton's language, for which there are no types.

import triton
import triton.language as tl


@triton.jit
def find_tile(counts_E, tile, rows, E: tl.constexpr, BLOCK_R: tl.constexpr):
    """-> expert of a tile of up to BLOCK_R rows, its first row, and the end of the expert's rows. A tile without rows
    begins at that end or behind it."""
    if counts_E is None:
        return tile * 0, tile * BLOCK_R, rows
    else:
        experts = tl.arange(0, triton.next_power_of_2(E))
        counts = tl.load(counts_E + experts, mask=experts < E, other=0).to(tl.int32)
        tiles = (counts + BLOCK_R - 1) // BLOCK_R
        expert = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
        begin = tl.sum(tl.where(experts < expert, counts, 0))
        end = tl.sum(tl.where(experts <= expert, counts, 0))
        return expert, begin + (tile - tl.sum(tl.where(experts < expert, tiles, 0))) * BLOCK_R, end


@triton.jit
def convert(values, kind: tl.constexpr, dtype: tl.constexpr):
    """Quantized values in a float dtype. A byte of int4 holds two values, the first in its lower half: the result is
    twice as wide. Those of fp8 are multiplied by 2^-8."""
    if kind == "int4":
        return tl.interleave(from_nibble(values & 15, dtype), from_nibble(values >> 4, dtype))
    elif kind == "fp8":
        return from_e4m3(values).to(dtype)
    else:
        return values.to(dtype)


@triton.jit
def from_nibble(values, dtype: tl.constexpr):
    """0 to 15 -> -8 to 7. Placed in the lowest bits of a power of two whose last bit has the value 1, they need no
    conversion from integers, which is slower than arithmetic."""
    if dtype == tl.bfloat16:
        return (values.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136  # 2^7 + 8
    elif dtype == tl.float16:
        return (values.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032  # 2^10 + 8
    else:
        return values.to(tl.float32) - 8


@triton.jit
def from_e4m3(values):
    """Bytes of e4m3 as float16, times 2^-8: the exponent moves into a field of one bit more, whose bias is 15 and not
    7. Exact, also for subnormal numbers, and on GPUs that know no e4m3."""
    return ((values.to(tl.int16) << 8 >> 1) & ~0x4000).to(tl.float16, bitcast=True)


@triton.jit
def gemv(
    x_RI,
    values_EOI,
    scales_EOG,
    x_scales_R,
    counts_E,
    y_RO,
    rows,
    outputs,
    inputs: tl.constexpr,
    E: tl.constexpr,
    kind: tl.constexpr,
    group: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Program (r, b) computes outputs b * BLOCK_O, ... of row r. BLOCK_I divides the inputs; STEP divides BLOCK_I and
    `group`, the inputs that share a scale, which is 0 if all do."""
    PACK: tl.constexpr = 2 if kind == "int4" else 1
    expert, row, end = find_tile(counts_E, tl.program_id(0), rows, E, 1)
    if row >= end:
        return
    row = row.to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    matrix_row = expert.to(tl.int64) * outputs + tl.minimum(o, outputs - 1)
    values = values_EOI + (matrix_row * (inputs // PACK))[:, None] + tl.arange(0, BLOCK_I // PACK)[None, :]
    sums = tl.zeros([BLOCK_O, BLOCK_I // STEP], tl.float32)
    for start in range(0, inputs, BLOCK_I):
        weights = convert(tl.load(values + start // PACK), kind, tl.float32)
        x = tl.load(x_RI + row * inputs + start + tl.arange(0, BLOCK_I))
        x = from_e4m3(x).to(tl.float32) if kind == "fp8" else x.to(tl.float32)
        part = tl.sum(tl.reshape(weights * x[None, :], [BLOCK_O, BLOCK_I // STEP, STEP]), 2)
        if group:
            g = (start + tl.arange(0, BLOCK_I // STEP) * STEP) // group
            part *= tl.load(scales_EOG + (matrix_row * (inputs // group))[:, None] + g[None, :]).to(tl.float32)
        sums += part
    y = tl.sum(sums, 1)
    if not group:
        y *= tl.load(scales_EOG + matrix_row).to(tl.float32)
    if kind == "fp8":
        y *= tl.load(x_scales_R + row) * 65536.0  # twice 2^8
    tl.store(y_RO + row * outputs + o, y.to(y_RO.dtype.element_ty), mask=o < outputs)


@triton.jit
def grouped_gemm(
    x_RI,
    values_EOI,
    scales_EOG,
    x_scales_R,
    counts_E,
    y_RO,
    rows,
    outputs,
    inputs: tl.constexpr,
    E: tl.constexpr,
    kind: tl.constexpr,
    group: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Program (t, b) computes outputs b * BLOCK_O, ... of the t-th tile of rows. BLOCK_I divides the inputs and
    `group`, the inputs that share a scale, which is 0 if all do."""
    PACK: tl.constexpr = 2 if kind == "int4" else 1
    dtype: tl.constexpr = tl.float16 if kind == "fp8" else x_RI.dtype.element_ty
    expert, begin, end = find_tile(counts_E, tl.program_id(0), rows, E, BLOCK_R)
    if begin >= end:
        return
    row = begin + tl.arange(0, BLOCK_R)
    real_row = tl.minimum(row, end - 1).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    matrix_row = expert.to(tl.int64) * outputs + tl.minimum(o, outputs - 1)
    values = values_EOI + (matrix_row * (inputs // PACK))[:, None] + tl.arange(0, BLOCK_I // PACK)[None, :]
    x_columns = x_RI + (real_row * inputs)[None, :] + tl.arange(0, BLOCK_I)[:, None]
    sums = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
    for start in range(0, inputs, BLOCK_I):
        weights = convert(tl.load(values + start // PACK), kind, dtype)
        x = tl.load(x_columns + start)
        x = from_e4m3(x) if kind == "fp8" else x
        if group:
            scale = tl.load(scales_EOG + matrix_row * (inputs // group) + start // group).to(tl.float32)
            sums += tl.dot(weights, x, input_precision="ieee") * scale[:, None]
        else:
            sums = tl.dot(weights, x, sums, input_precision="ieee")
    if not group:
        sums *= tl.load(scales_EOG + matrix_row).to(tl.float32)[:, None]
    if kind == "fp8":
        sums *= tl.load(x_scales_R + real_row)[None, :] * 65536.0  # twice 2^8
    y = y_RO + (row.to(tl.int64) * outputs)[None, :] + o[:, None]
    tl.store(y, sums.to(y_RO.dtype.element_ty), mask=(row < end)[None, :] & (o < outputs)[:, None])
