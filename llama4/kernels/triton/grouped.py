"""A Triton kernel for y = x W, where W is one of E matrices in bfloat16 and the rows of x are sorted by expert; for
Hopper, whose copy engine (TMA) fills shared memory while the tensor cores multiply.

Shapes: R rows, I inputs, O outputs, E experts.
"""

# mypy: ignore-errors
# What is inside the kernels is Triton's language, for which there are no types.

import triton
import triton.language as tl

from llama4.kernels.triton.tiles import find_block


@triton.jit
def grouped_mm(
    x_RI,
    more_RI,
    weight_EIO,
    counts_E,
    y_RO,
    rows,
    outputs,
    inputs: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MORE_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program computes BLOCK_O outputs of a tile of up to BLOCK_R + MORE_R rows, BLOCK_R of them if that is enough.
    BLOCK_I divides the inputs. Rows behind those of the expert are computed, and not stored.

    Args:
        x_RI: descriptor of blocks [BLOCK_R, BLOCK_I].
        more_RI: of blocks [MORE_R, BLOCK_I]; None where MORE_R is 0.
        weight_EIO: of blocks [BLOCK_I, BLOCK_O] of a matrix [E * I, O].
    """
    expert, begin, end, o = find_block(counts_E, rows, outputs, E, BLOCK_R + MORE_R, BLOCK_O, TILES)
    if begin >= end:
        return
    if more_RI is None or end - begin <= BLOCK_R:
        sums = product(x_RI, weight_EIO, begin, expert * inputs, o, inputs, BLOCK_R, BLOCK_O, BLOCK_I)
    else:
        sums = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
        more = tl.zeros([MORE_R, BLOCK_O], tl.float32)
        for i in range(0, inputs, BLOCK_I):
            weights = weight_EIO.load([expert * inputs + i, o])
            sums = tl.dot(x_RI.load([begin, i]), weights, sums)
            more = tl.dot(more_RI.load([begin + BLOCK_R, i]), weights, more)
        store(y_RO, more, begin + BLOCK_R, end, o, outputs)
    store(y_RO, sums, begin, end, o, outputs)


@triton.jit
def product(
    x_RI,
    weight_EIO,
    row,
    weight_row,
    o,
    inputs: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Of rows from a row on with outputs from an output on, [BLOCK_R, BLOCK_O]; the matrix begins at `weight_row`."""
    sums = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    for i in range(0, inputs, BLOCK_I):
        sums = tl.dot(x_RI.load([row, i]), weight_EIO.load([weight_row + i, o]), sums)
    return sums


@triton.jit
def store(y_RO, sums, begin, end, first_o, outputs):
    """The sums of the rows from `begin` on that come before `end`."""
    row, o = begin + tl.arange(0, sums.shape[0]), first_o + tl.arange(0, sums.shape[1])
    y = y_RO + (row.to(tl.int64) * outputs)[:, None] + o[None, :]
    tl.store(y, sums.to(y_RO.dtype.element_ty), mask=(row < end)[:, None] & (o < outputs)[None, :])
