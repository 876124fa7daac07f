"""Triton kernels for y = x W^T, where W is one of E quantized matrices and the rows of x are sorted by expert.

Two multiply. They read quantized values as a checkpoint stores them, convert them in registers and accumulate in
float32. The values are integers or e4m3, exact in every dtype that a product is computed in; scales are applied to
sums, so no weight is rounded.

- `gemv` is for decoding, where each byte of a matrix is read for a row or few and memory bandwidth is the limit.
- `grouped_gemm` is for prompts, where a matrix is read once per tile of rows and arithmetic is the limit. A program
  computes a tile of outputs x rows of one expert on tensor cores. It computes (W x^T)^T: the weights are then the left
  operand, which Hopper's tensor cores take from registers, where the values were converted.

The third, `unpack`, writes the matrices in bfloat16, for torch's products of very many rows: each weight is rounded
once.

Shapes: R rows, I inputs, O outputs, E experts, G groups of inputs that share a scale; T threads, W words of 32 bits.
"""

# mypy: ignore-errors
# What is inside the kernels is Triton's language, for which there are no types.

import triton
import triton.language as tl

from llama4.kernels.triton.number_formats import from_e4m3, from_nibble, place, place_e4m3
from llama4.kernels.triton.tiles import find_block, find_tile


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
def add_products(sums_TOR, words_TO, x, kind: tl.constexpr, exponent):
    """To the sums, the products of the weights in a word for each thread and output with the thread's inputs of each
    row, x [T, R, 8 or 4]."""
    T: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    x = from_e4m3(x).to(tl.float32) * 2.0**108 if kind == "fp8" else x.to(tl.float32)
    words = words_TO[:, :, None]
    if kind == "int4":
        even, odd = tl.split(tl.reshape(x, [T, 1, R, 4, 2]))
        x04, x26 = tl.split(tl.reshape(even, [T, 1, R, 2, 2]))
        x15, x37 = tl.split(tl.reshape(odd, [T, 1, R, 2, 2]))
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        upper = words >> 12
        sums_TOR += place(words, 0, 4, False, exponent) * x0
        sums_TOR += place(words, 4, 4, False, exponent) * x1
        sums_TOR += place(words, 8, 4, False, exponent) * x2
        sums_TOR += place(words, 12, 4, False, exponent) * x3
        sums_TOR += place(words, 16, 4, False, exponent) * x4
        sums_TOR += place(upper, 8, 4, False, exponent) * x5
        sums_TOR += place(upper, 12, 4, False, exponent) * x6
        sums_TOR += place(upper, 16, 4, False, exponent) * x7
    else:
        even, odd = tl.split(tl.reshape(x, [T, 1, R, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        if kind == "int8":
            upper = words >> 16
            sums_TOR += place(words, 0, 8, True, exponent) * x0
            sums_TOR += place(words, 8, 8, True, exponent) * x1
            sums_TOR += place(upper, 0, 8, True, exponent) * x2
            sums_TOR += place(upper, 8, 8, True, exponent) * x3
        else:
            sums_TOR += place_e4m3(words, 0) * x0
            sums_TOR += place_e4m3(words, 1) * x1
            sums_TOR += place_e4m3(words, 2) * x2
            sums_TOR += place_e4m3(words, 3) * x3
    return sums_TOR


@triton.jit
def gemv(
    x_RI,
    values_EOW,
    scales_EOG,
    x_scales_R,
    counts_E,
    y_RO,
    values_1,
    scales_1,
    values_2,
    scales_2,
    exponent,
    rows,
    outputs,
    outputs_1,
    outputs_2,
    inputs: tl.constexpr,
    E: tl.constexpr,
    kind: tl.constexpr,
    group: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    THREADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (t, b) computes the b-th block of outputs of the t-th tile of rows; without counts there may be up to
    three matrices, whose outputs lie side by side. The last block of a matrix ends with it and shares outputs with the
    one before; no matrix has less than a block.

    It is fast because a weight costs hardly more than three instructions, a logical operation, a subtraction and a
    multiply-add, for which an H100 has time while it reads 4 bits. So nothing else happens per weight. A thread takes
    16 bytes of each output of the block at a time; the inputs that belong to them are in its registers already, and
    serve all the outputs; it keeps its sums to itself until the end; and it applies a scale once, since `group`, the
    inputs that share one, 0 if all do, is a multiple of its inputs.

    Triton gives consecutive threads to the first dimension of tiles in which the last is a thread's own. So those of
    values, scales and inputs have the same layout, and nothing has to be exchanged between threads.

    EARLY: the program may start before the kernel that it follows has ended.
    """
    IN_WORD: tl.constexpr = 8 if kind == "int4" else 4
    IN_THREAD: tl.constexpr = 4 * IN_WORD
    if EARLY:
        tl.extra.cuda.gdc_wait()
    expert, begin, end = find_tile(counts_E, tl.program_id(0), rows, E, BLOCK_R)
    if begin >= end:
        return
    block, column, columns = tl.program_id(1), 0, outputs
    if values_1 is not None:
        columns += outputs_1 + outputs_2
        blocks, blocks_1 = tl.cdiv(outputs, BLOCK_O), tl.cdiv(outputs_1, BLOCK_O)
        if block >= blocks:
            block, column = block - blocks, outputs
            values_EOW, scales_EOG, outputs = values_1, scales_1, outputs_1
            if values_2 is not None:  # noqa: SIM102  # not a value of the kernel
                if block >= blocks_1:
                    block, column = block - blocks_1, column + outputs_1
                    values_EOW, scales_EOG, outputs = values_2, scales_2, outputs_2
        values_EOW = tl.multiple_of(values_EOW, 16)  # which the compiler forgets where it depends
    first = tl.minimum(block * BLOCK_O, outputs - BLOCK_O)
    matrix_row = expert.to(tl.int64) * outputs + first
    t, o = tl.arange(0, THREADS), tl.arange(0, BLOCK_O)
    words: tl.constexpr = inputs // IN_WORD
    values = values_EOW + matrix_row * words
    values += (4 * t)[:, None, None] + (words * o)[None, :, None] + tl.arange(0, 4)[None, None]
    scales = scales_EOG + matrix_row * (inputs // group if group else 1)
    if not group:
        scale = tl.load(scales + o)
    row = begin + tl.arange(0, BLOCK_R)
    real_row = tl.minimum(row, end - 1).to(tl.int64)
    x = x_RI + (real_row * inputs)[None, :, None] + (IN_THREAD * t)[:, None, None] + tl.arange(0, IN_WORD)[None, None]
    exponent = exponent.to(tl.uint32)
    sums = tl.zeros([THREADS, BLOCK_O, BLOCK_R], tl.float32)
    for start in range(0, inputs, THREADS * IN_THREAD):
        i, inside, zero = start + IN_THREAD * t, None, None
        if inputs % (THREADS * IN_THREAD):
            inside, zero = (i < inputs)[:, None, None], 0
        four_words = tl.load(values + start // IN_WORD, mask=inside)
        if group:
            g = tl.minimum(i, inputs - 1) // group
            scale = tl.load(scales + g[:, None] + (inputs // group * o)[None])
        x_0 = tl.load(x + start, mask=inside, other=zero)
        x_1 = tl.load(x + start + IN_WORD, mask=inside, other=zero)
        x_2 = tl.load(x + start + 2 * IN_WORD, mask=inside, other=zero)
        x_3 = tl.load(x + start + 3 * IN_WORD, mask=inside, other=zero)
        even, odd = tl.split(tl.reshape(four_words, [THREADS, BLOCK_O, 2, 2]))
        words_0, words_2 = tl.split(even)
        words_1, words_3 = tl.split(odd)
        part = tl.zeros_like(sums)
        part = add_products(part, words_0, x_0, kind, exponent)
        part = add_products(part, words_1, x_1, kind, exponent)
        part = add_products(part, words_2, x_2, kind, exponent)
        part = add_products(part, words_3, x_3, kind, exponent)
        if group:
            part *= scale.to(tl.float32)[:, :, None]
        sums += part
    y = tl.sum(sums, 0)
    if not group:
        y *= scale.to(tl.float32)[:, None]
    if kind == "fp8":
        y *= tl.load(x_scales_R + real_row)[None] * 2.0**20  # 2^-120 of a weight, 2^100 of an input
    y_OR = y_RO + (row.to(tl.int64) * columns)[None] + (column + first + o)[:, None]
    tl.store(y_OR, y.to(y_RO.dtype.element_ty), mask=(row < end)[None])


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
    TILES: tl.constexpr,
):
    """A program computes BLOCK_O outputs of a tile of BLOCK_R rows. BLOCK_I divides the inputs and `group`, the inputs
    that share a scale, which is 0 if all do. Past the last output or row, the last one is read and nothing is stored.
    Products of a group are added up by the tensor cores, and multiplied by the scale together.
    """
    PACK: tl.constexpr = 2 if kind == "int4" else 1
    dtype: tl.constexpr = tl.float16 if kind == "fp8" else x_RI.dtype.element_ty
    expert, begin, end, first_o = find_block(counts_E, rows, outputs, E, BLOCK_R, BLOCK_O, TILES)
    if begin >= end:
        return
    row = begin + tl.arange(0, BLOCK_R)
    real_row = tl.minimum(row, end - 1).to(tl.int64)
    o = first_o + tl.arange(0, BLOCK_O)
    matrix_row = expert.to(tl.int64) * outputs + tl.minimum(o, outputs - 1)
    values = values_EOI + (matrix_row * (inputs // PACK))[:, None] + tl.arange(0, BLOCK_I // PACK)[None, :]
    x_columns = x_RI + (real_row * inputs)[None, :] + tl.arange(0, BLOCK_I)[:, None]
    sums = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
    IN_STEP: tl.constexpr = 2 * BLOCK_I if group and group % (2 * BLOCK_I) == 0 else BLOCK_I
    for first in range(0, inputs, IN_STEP):
        part = tl.zeros_like(sums) if group else sums
        for start in tl.static_range(0, IN_STEP, BLOCK_I):
            weights = convert(tl.load(values + (first + start) // PACK), kind, dtype)
            x = tl.load(x_columns + first + start)
            x = from_e4m3(x) if kind == "fp8" else x
            part = tl.dot(weights, x, part, input_precision="ieee")
        if group:
            scale = tl.load(scales_EOG + matrix_row * (inputs // group) + first // group).to(tl.float32)
            sums += part * scale[:, None]
        else:
            sums = part
    if not group:
        sums *= tl.load(scales_EOG + matrix_row).to(tl.float32)[:, None]
    if kind == "fp8":
        sums *= tl.load(x_scales_R + real_row)[None, :] * 65536.0  # twice 2^8
    y = y_RO + (row.to(tl.int64) * outputs)[None, :] + o[:, None]
    tl.store(y, sums.to(y_RO.dtype.element_ty), mask=(row < end)[None, :] & (o < outputs)[:, None])


@triton.jit
def unpack(
    values_EOW,
    scales_EOG,
    weights_EOI,
    words,
    values_stride,
    scales_stride,
    kind: tl.constexpr,
    group: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, e) writes the weights that are in BLOCK words of matrix e: integers of 4 or 8 bits, times the scale
    that `group` of them share. A thread stores what a word gives, 16 or 8 bytes.

    Args:
        words: of a matrix.
        values_stride, scales_stride: from one matrix to the next.
    """
    BITS: tl.constexpr = 4 if kind == "int4" else 8
    IN_WORD: tl.constexpr = 32 // BITS
    expert = tl.program_id(1).to(tl.int64)
    word, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, IN_WORD)
    inside = word < words
    packed = tl.load(values_EOW + expert * values_stride + word, mask=inside, other=0)
    if kind == "int4":
        packed ^= 0x88888888 - (1 << 32)  # from 8 more than a value to two's complement
    scale = tl.load(scales_EOG + expert * scales_stride + word // (group // IN_WORD), mask=inside, other=0)
    numbers = packed[:, None] << (32 - BITS - BITS * n)[None, :] >> (32 - BITS)
    weights = numbers.to(tl.float32) * scale.to(tl.float32)[:, None]
    at = weights_EOI + expert * words * IN_WORD + (word * IN_WORD)[:, None] + n[None, :]
    tl.store(at, weights.to(weights_EOI.dtype.element_ty), mask=inside[:, None])
