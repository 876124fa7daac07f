"""Parts of Triton kernels: which rows and outputs a program computes, of rows that are sorted by expert.

Only the device knows how many rows an expert has. So the grid has the size of the worst case, each program finds its
expert by summing the counts, and programs without one return. Nothing waits for the device, and a launch can be
replayed with other counts.

Shapes: R rows, O outputs, E experts.
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
def find_block(
    counts_E, rows, outputs, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, TILES: tl.constexpr
):
    """`find_tile` of a program that computes BLOCK_O outputs of it, and the first of these outputs.

    Programs that run at the same time have few different rows and outputs, which are then read from the cache: of
    TILES tiles all outputs are computed before the next tiles begin.
    """
    blocks = tl.cdiv(outputs, BLOCK_O)
    program, at_once = tl.program_id(0), TILES * blocks
    first_tile = program // at_once * TILES
    tiles = tl.minimum(tl.num_programs(0) // blocks - first_tile, TILES)
    tile, block = first_tile + program % at_once % tiles, program % at_once // tiles
    expert, begin, end = find_tile(counts_E, tile, rows, E, BLOCK_R)
    return expert, begin, end, block * BLOCK_O
