"""Triton kernels for attention in a step of decoding: one query per head and row against keys and values in blocks.

A block is a run of bytes as `llama4.cache.layer` describes it: values [2, K, BLOCK, C] in one of the cache's formats,
keys first, and bfloat16 scales [2, K, BLOCK] behind them if the format is scaled. Kernels find blocks by their
addresses in a table. Everything that changes from step to step, addresses, slots and lengths, is read on the device: a
launch can be replayed from a CUDA graph.

- `write` encodes the keys and values of new tokens and puts them into their slots.
- `attend` is flash decoding: all queries that share a key head meet a share of its keys. Quantized keys and values are
  exact in the dtype of the queries; scales of keys are applied to scores, scales of values to probabilities.
- `combine` merges the shares of a head by their log-sum-exp.

Shapes: B rows, H query heads, K key/value heads, G = H / K, C head_dim, W blocks of a row, S keys of a tile.
"""

# mypy: ignore-errors
# What is inside the kernels is Triton's language, for which there are no types.

import triton
import triton.language as tl

from llama4.kernels.triton.number_formats import from_e4m3, from_nibble, largest_magnitude, magnitudes, to_e4m3

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def pointer(address, dtype: tl.constexpr):
    """To a block. Allocators align by more than the 16 bytes that a thread loads at once."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["table_row", "splits"])
def attend(
    q_BHC,
    table_BW,
    lengths_B,
    parts_BHSC,
    lse_BHS,
    out_BHC,
    k_BKC,
    v_BKC,
    slots_B,
    q_row,
    q_head,
    table_row,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,
    splits,
    stored: tl.constexpr,
    kind: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (b * K + k, s) computes the s-th share of the keys of a head, if there are so many.

    Args:
        parts_BHSC, lse_BHS: attention over each share, float32, and the logarithm to base 2 of its denominator; None
            where rows have one share each, which goes to `out_BHC`.
        k_BKC, v_BKC, slots_B: new keys and values, which the program that reads their slots puts there first; None
            where `write` has.
        q_row, q_head, table_row, k_row, k_head, v_row, v_head: strides.
        scale: of scores, times log2(e).
        stored: the dtype that values are loaded as.
        BLOCK_S: divides BLOCK.
        BLOCK_C: C, or of int4 C / 2, rounded up to a power of two.
    """
    is_int4: tl.constexpr = kind == "int4"
    is_scaled: tl.constexpr = kind == "int4" or kind == "int8" or kind == "fp8"
    dtype: tl.constexpr = q_BHC.dtype.element_ty
    WIDTH: tl.constexpr = C // 2 if is_int4 else C
    row, head, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    length = tl.load(lengths_B + row).to(tl.int32)
    share = share_size(length, splits, BLOCK_S)
    begin = split * share
    end = tl.minimum(begin + share, length)
    if begin >= end:
        return
    table_W = table_BW + row.to(tl.int64) * table_row
    if k_BKC is not None:
        slot = tl.load(slots_B + row).to(tl.int32)
        if (slot >= begin) & (slot < end):
            new = tl.load(table_W + slot // BLOCK)
            slot = head * BLOCK + slot % BLOCK
            k_C = k_BKC + row.to(tl.int64) * k_row + head * k_head
            v_C = v_BKC + row.to(tl.int64) * v_row + head * v_head
            encode(k_C, new, slot, kind, stored, K, C, BLOCK, BLOCK_C)
            encode(v_C, new, K * BLOCK + slot, kind, stored, K, C, BLOCK, BLOCK_C)
            tl.debug_barrier()  # what one thread has written, others read

    g, c, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    is_query = (g < G)[:, None] & (c < WIDTH)[None, :]
    q_at = row.to(tl.int64) * q_row + ((head * G + g) * q_head)[:, None] + c[None, :]
    q = tl.load(q_BHC + q_at, mask=is_query, other=0)
    out = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    if is_int4:
        q_high = tl.load(q_BHC + q_at + WIDTH, mask=is_query, other=0)
        out_high = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    largest = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)

    address = tl.load(table_W + begin // BLOCK)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        is_seen = start + s < end  # what is stored behind may be no number
        first = head * BLOCK + start % BLOCK
        values_at = pointer(address, stored) + (first + s)[:, None] * WIDTH + c[None, :]
        is_stored = is_seen[:, None] & (c < WIDTH)[None, :]
        keys = tl.load(values_at, mask=is_stored, other=0)
        values = tl.load(values_at + K * BLOCK * WIDTH, mask=is_stored, other=0)
        if is_scaled:
            pairs_at = pointer(address, tl.uint32) + (K * BLOCK * WIDTH + first) // 2 + tl.arange(0, BLOCK_S // 2)
            key_scales = from_pairs(tl.load(pairs_at))
            value_scales = tl.where(is_seen, from_pairs(tl.load(pairs_at + K * BLOCK // 2)), 0)
        address = tl.load(table_W + tl.minimum(start + BLOCK_S, end - 1) // BLOCK)  # of the next tile
        if is_int4:
            scores = tl.dot(q, tl.trans(from_nibble(keys & 15, dtype)), input_precision="ieee")
            scores = tl.dot(q_high, tl.trans(from_nibble(keys >> 4, dtype)), scores, input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(exact(keys, kind, dtype)), input_precision="ieee")
        scores *= key_scales[None, :] * (scale * factor(kind)) if is_scaled else scale
        scores = tl.where(is_seen[None, :], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        largest = new_largest
        total = total * decay + tl.sum(weights, 1)
        weights = (weights * (value_scales[None, :] * factor(kind)) if is_scaled else weights).to(dtype)
        if is_int4:
            low, high = from_nibble(values & 15, dtype), from_nibble(values >> 4, dtype)
            out = tl.dot(weights, low, out * decay[:, None], input_precision="ieee")
            out_high = tl.dot(weights, high, out_high * decay[:, None], input_precision="ieee")
        else:
            out = tl.dot(weights, exact(values, kind, dtype), out * decay[:, None], input_precision="ieee")

    query = row.to(tl.int64) * (K * G) + head * G + g
    if parts_BHSC is None:
        to, at = out_BHC, (query * C)[:, None] + c[None, :]
    else:
        to, at = parts_BHSC, ((query * splits + split) * C)[:, None] + c[None, :]
        tl.store(lse_BHS + query * splits + split, largest + tl.log2(total), mask=g < G)
    tl.store(to + at, (out / total[:, None]).to(to.dtype.element_ty), mask=is_query)
    if is_int4:
        tl.store(to + at + WIDTH, (out_high / total[:, None]).to(to.dtype.element_ty), mask=is_query)


@triton.jit
def share_size(length, splits, BLOCK_S: tl.constexpr):
    """Keys of one share of a row: whole tiles."""
    return tl.cdiv(tl.cdiv(length, BLOCK_S), splits) * BLOCK_S


@triton.jit
def from_pairs(pairs):
    """Two bfloat16 each -> float32, twice as many. Loads of less than 4 bytes are not pipelined."""
    return tl.interleave((pairs << 16).to(tl.float32, bitcast=True), (pairs & 0xFFFF0000).to(tl.float32, bitcast=True))


@triton.jit
def exact(values, kind: tl.constexpr, dtype: tl.constexpr):
    """Stored values in the dtype of the queries; of quantized ones `factor` is left out."""
    return from_e4m3(values).to(dtype) if kind == "fp8" else values.to(dtype)


@triton.jit
def factor(kind: tl.constexpr):
    """What stored values are to be multiplied by, beside their scales."""
    return 256.0 if kind == "fp8" else 1.0


@triton.jit(do_not_specialize=["splits"])
def combine(
    parts_BHSC,
    lse_BHS,
    lengths_B,
    out_BHC,
    splits,
    H: tl.constexpr,
    C: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Program b * H + h merges the shares of one query of `attend`."""
    query = tl.program_id(0)
    length = tl.load(lengths_B + query // H).to(tl.int32)
    shares = tl.cdiv(length, share_size(length, splits, BLOCK_S))
    lse_S, parts_SC = lse_BHS + query.to(tl.int64) * splits, parts_BHSC + query.to(tl.int64) * splits * C
    s, c = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_C)
    lse = tl.load(lse_S + s, mask=s < shares, other=-float("inf"))
    largest = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - largest), 0)
    out = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, shares, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
        weights = tl.exp2(tl.load(lse_S + i, mask=i < shares, other=-float("inf")) - largest)
        is_part = (i < shares)[:, None] & (c < C)[None, :]
        out += tl.sum(tl.load(parts_SC + i[:, None] * C + c[None, :], mask=is_part, other=0) * weights[:, None], 0)
    tl.store(out_BHC + query.to(tl.int64) * C + c, (out / total).to(out_BHC.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["first", "table_row"])
def write(
    k_BKC,
    v_BKC,
    table_BW,
    slots_B,
    first,
    k_row,
    k_head,
    v_row,
    v_head,
    table_row,
    kind: tl.constexpr,
    stored: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (b * K + k, 0) puts a new key into its slot, program (b * K + k, 1) a new value.

    Args:
        slots_B: None: token b goes to slot first + b.
        k_row, k_head, v_row, v_head, table_row: strides.
        BLOCK_C: C, or of int4 C / 2, rounded up to a power of two.
    """
    row, head, part = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K, tl.program_id(1)
    x_C = k_BKC + row * k_row + head * k_head
    if part == 1:
        x_C = v_BKC + row * v_row + head * v_head
    slot = first + row if slots_B is None else tl.load(slots_B + row)
    address = tl.load(table_BW + row * table_row + slot // BLOCK)
    encode(x_C, address, (part * K + head) * BLOCK + slot % BLOCK, kind, stored, K, C, BLOCK, BLOCK_C)


@triton.jit
def encode(
    x_C,
    address,
    slot,
    kind: tl.constexpr,
    stored: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Put one head's key or value into a slot of a block, counted from the block's first, as `CacheFormat.encode` gives
    it, bit for bit."""
    WIDTH: tl.constexpr = C // 2 if kind == "int4" else C
    dtype: tl.constexpr = x_C.dtype.element_ty
    c = tl.arange(0, BLOCK_C)
    x = tl.load(x_C + c, mask=c < WIDTH, other=0)
    values_at = pointer(address, stored) + slot * WIDTH + c
    scale_at = pointer(address, tl.bfloat16) + K * BLOCK * WIDTH + slot
    if kind == "int4":
        x, x_high = x.to(tl.float32), tl.load(x_C + WIDTH + c, mask=c < WIDTH, other=0).to(tl.float32)
        low, high = first_largest(x, c), first_largest(x_high, c)
        scale = rounded_scale(tl.where(magnitudes(high) > magnitudes(low), high, low) / -8, dtype)
        nibbles = to_nibble(x, scale) | to_nibble(x_high, scale) << 4
        tl.store(values_at, nibbles, mask=c < WIDTH)
        tl.store(scale_at, scale)
    elif kind == "int8" or kind == "fp8":
        LARGEST: tl.constexpr = 127.0 if kind == "int8" else 448.0
        x = x.to(tl.float32)
        scale = rounded_scale(tl.div_rn(largest_magnitude(x), LARGEST), dtype)
        x = tl.div_rn(x, scale.to(tl.float32))
        x = round_even(clamped(x, -LARGEST, LARGEST)).to(tl.int8) if kind == "int8" else to_e4m3(x)
        tl.store(values_at, x, mask=c < WIDTH)
        tl.store(scale_at, scale)
    else:
        tl.store(values_at, x.to(stored), mask=c < WIDTH)


@triton.jit
def first_largest(x, c):
    """The number of the largest magnitude, the first of several."""
    return tl.sum(tl.where(c == tl.argmax(magnitudes(x), 0, tie_break_left=True), x, 0), 0)


@triton.jit
def rounded_scale(scale, dtype: tl.constexpr):
    """A float32 scale, as one that was computed in a dtype, in bfloat16; 1 where it is 0, NaN where it is infinite."""
    scale = scale.to(dtype).to(tl.float32)
    scale = tl.where(tl.abs(scale) == float("inf"), float("nan"), scale)
    return tl.where(scale == 0, 1.0, scale).to(tl.bfloat16)


@triton.jit
def to_nibble(x, scale):
    """-> 0 to 15: -8 to 7, plus 8."""
    return (clamped(round_even(tl.div_rn(x, scale.to(tl.float32))), -8, 7) + 8).to(tl.uint8)


@triton.jit
def clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def round_even(x):
    """To the nearest integer, the even one of two, for magnitudes below 2^22: float32 has no place for fractions
    beside 1.5 x 2^23."""
    return (x + 12582912.0) - 12582912.0
