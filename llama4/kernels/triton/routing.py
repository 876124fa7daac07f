"""Triton kernels around the experts of a layer: the router's logits, rows to their experts, results back to the tokens.

Every program works out by itself where its rows go, from what all tokens chose: there are no atomic additions, so the
order of rows is stable, sums are always in the same order, and a launch can be replayed for other choices.

Shapes: N tokens, D hidden size, E experts, k experts per token, R = N * k routed rows.
"""

# mypy: ignore-errors
# What is inside the kernels is Triton's language, for which there are no types.

import triton
import triton.language as tl


@triton.jit
def router_logits(x_ND, weight_ED, logits_NE, E: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Program (n, e) multiplies token n with the weights of expert e."""
    n, e = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ND + n * D + d, mask=d < D, other=0).to(tl.float32)
    weight = tl.load(weight_ED + e * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(logits_NE + n * E + e, tl.sum(x * weight))


@triton.jit
def sort_by_expert(experts_R, tokens_R, rows_R, counts_E, R, k: tl.constexpr, BLOCK: tl.constexpr):
    """Program e finds the choices of expert e, and how many rows come before them: choice i has its row at rows_R[i],
    and the row is of token i // k."""
    e = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for start in range(0, R, BLOCK):
        i = start + tl.arange(0, BLOCK)
        chosen = tl.load(experts_R + i, mask=i < R, other=e + 1)
        before += (chosen < e).to(tl.int32)
        own += (chosen == e).to(tl.int32)
    tl.store(counts_E + e, tl.sum(own))
    first = tl.sum(before)
    for start in range(0, R, BLOCK):
        i = start + tl.arange(0, BLOCK)
        is_own = tl.load(experts_R + i, mask=i < R, other=e + 1) == e
        row = first + tl.cumsum(is_own.to(tl.int32)) - 1
        tl.store(rows_R + i, row, mask=is_own)
        tl.store(tokens_R + row, i // k, mask=is_own)
        first += tl.sum(is_own.to(tl.int32))


@triton.jit
def scatter_scaled(x_ND, scores_R, rows_R, x_RD, D, k: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, b) writes elements b * BLOCK, ... of the row of choice i: its token times its score."""
    i = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, score = tl.load(rows_R + i), tl.load(scores_R + i)
    x = tl.load(x_ND + (i // k).to(tl.int64) * D + d, mask=d < D).to(tl.float32)
    tl.store(x_RD + row * D + d, (x * score).to(x_RD.dtype.element_ty), mask=d < D)


@triton.jit
def dispatch_top_1(
    x_ND,
    logits_NE,
    x_RD,
    counts_E,
    tokens_R,
    rows_N,
    N,
    D,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choice, sorting and scattering at once for at most BLOCK_N tokens of one expert each. Program (n, b) writes
    elements b * BLOCK, ... of the row of token n."""
    n = tl.program_id(0)
    tokens, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    inside = (tokens < N)[:, None] & (e < E)[None, :]
    logits = tl.load(logits_NE + tokens[:, None] * E + e[None, :], mask=inside, other=-float("inf"))
    # Threads that reduce numbers without an order come to different results. NaN is the largest, as in torch: more than
    # infinity, in whose place stands the largest number.
    ordered = tl.where(logits == logits, tl.minimum(logits, 3.4028234663852886e38), float("inf"))
    _, chosen = tl.max(ordered, 1, return_indices=True)  # the lowest index on ties
    chosen = tl.where(tokens < N, chosen, E)
    own = tl.sum(tl.where(tokens == n, chosen, 0))
    row = tl.sum(((chosen < own) | ((chosen == own) & (tokens < n))).to(tl.int32)).to(tl.int64)
    score = tl.sigmoid(tl.load(logits_NE + n * E + own).to(tl.float32))
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ND + n.to(tl.int64) * D + d, mask=d < D).to(tl.float32)
    tl.store(x_RD + row * D + d, (x * score).to(x_RD.dtype.element_ty), mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(rows_N + n, row)
        tl.store(tokens_R + row, n)
        if n == 0:
            tl.store(counts_E + e, tl.sum((chosen[:, None] == e[None, :]).to(tl.int32), 0), mask=e < E)


@triton.jit
def combine(routed_RD, rows_Nk, out_ND, sum_ND, D, k: tl.constexpr, BLOCK: tl.constexpr):
    """Program (n, b) adds elements b * BLOCK, ... of the rows of token n to those of `out_ND`."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(out_ND + n * D + d, mask=d < D).to(tl.float32)
    for i in tl.static_range(k):
        row = tl.load(rows_Nk + n * k + i)
        total += tl.load(routed_RD + row * D + d, mask=d < D).to(tl.float32)
    tl.store(sum_ND + n * D + d, total, mask=d < D)
