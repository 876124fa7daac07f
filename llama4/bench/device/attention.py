"""Attention on the device: whether it is right, held to float64, and how fast it reads a cache.

Shapes: B rows, H query heads, K key/value heads, C head_dim, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.bench.device import machine, timing, workload
from llama4.bench.device.record import Figures, Record, Skip
from llama4.cache.formats import resolve_format
from llama4.cache.layer import LayerCache
from llama4.config import CACHE_BLOCK, TextConfig
from llama4.errors import Llama4Error
from llama4.kernels.triton import launch_attention
from llama4.ops.attention import causal_attention

HEADS = 40, 8, 128
"""H, K and C of Scout and Maverick."""
DRY_HEADS = 4, 2, 32
LENGTHS = 1, 255, 256, 257, 1000, 5000
DRY_LENGTHS = 1, 70
RATES = (1, 2048), (16, 2048), (1, 131072)
"""Rows, and keys that each sees."""


def run(record: Record) -> None:
    """The cases; kernels are interpreted where there is no GPU, which is slow and cannot round to bfloat16."""
    kinds = ("float32",) if record.dry else ("bfloat16", "int8", "fp8", "int4")
    for kind in kinds:
        record.case(f"attention of one token, {kind}", partial(_step, record, kind))
    record.case("attention of one token, a CUDA graph for other lengths", partial(_replayed, record))
    for kind in kinds[:2]:
        record.case(f"attention to a long past, {kind}", partial(_prompt, record, kind))
    for rows, keys in RATES if not record.dry else ((2, 70),):
        for kind in kinds:
            record.case(f"attention of {rows} x {keys} keys, {kind}", partial(_rate, record, kind, rows, keys))
        record.case(f"attention of {rows} x {keys} keys, torch", partial(_torch_rate, record, rows, keys))


def _dtype(record: Record) -> torch.dtype:
    return torch.float32 if record.dry else torch.bfloat16


def _made(record: Record, kind: str, lengths: Sequence[int], heads: tuple[int, int, int]) -> LayerCache:
    """A layer of a cache with room for so many tokens, zeros."""
    if reason := machine.triton_missing(record.device):
        raise Skip(reason)
    config = TextConfig(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=heads[2])
    cache = LayerCache(len(lengths), config, resolve_format(kind, torch.bfloat16), record.device)
    for row, length in enumerate(lengths):
        cache.reserve(row, 0, length)
        for block in cache.rows[row]:
            block.zero_()
    return cache


def _normal(record: Record, *shape: int) -> Tensor:
    return torch.randn(*shape, device=record.device).to(_dtype(record))


def _truth(q_NHC: Tensor, k_KSC: Tensor, v_KSC: Tensor, new: int = 1) -> Tensor:
    """In float64, a key head at a time; the last `new` keys are those of the queries."""
    outs = []
    N, S = len(q_NHC), k_KSC.shape[1]
    hidden = torch.ones(N, S, dtype=torch.bool, device=q_NHC.device).triu(S - new + 1)
    for q_GNC, k_SC, v_SC in zip(q_NHC.transpose(0, 1).chunk(len(k_KSC)), k_KSC, v_KSC, strict=True):
        scores = q_GNC.double() @ k_SC.double().mT * q_NHC.shape[2] ** -0.5
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_SC.double())
    return torch.cat(outs).transpose(0, 1)


def _stored(cache: LayerCache, row: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [K, S, C], float64."""
    parts = cache.read(row, length, torch.float64, cache.device)
    keys, values = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return keys, values


def _held(error: float, bound: float) -> Figures:
    if not error <= bound:
        raise Llama4Error(f"the relative error is {error:.2g}, beyond {bound:g}")
    return {"relative_error": error, "bound": bound}


def _step(record: Record, kind: str) -> Figures:
    """What is written is, bit for bit, what torch writes; attention is held to float64, after the write and with it."""
    heads, lengths = (DRY_HEADS, DRY_LENGTHS) if record.dry else (HEADS, LENGTHS)
    H, K, C = heads
    cache, other = _made(record, kind, lengths, heads), _made(record, kind, lengths, heads)
    for row, length in enumerate(lengths):
        past = _normal(record, 2, length - 1, K, C)
        for each in (cache, other):
            each.fill(row, 0, *past)
    q, (k, v) = _normal(record, len(lengths), H, C), _normal(record, 2, len(lengths), K, C)
    lengths_B = torch.tensor(lengths, device=record.device)
    table, slots_B = cache.block_table(), lengths_B - 1
    together = launch_attention.attend(q, table, lengths_B, K, kind, (k, v, slots_B))
    written = [[block.clone() for block in row] for row in cache.rows]
    launch_attention.write(k, v, table, slots_B, kind)
    out = launch_attention.attend(q, table, lengths_B, K, kind)
    truths = []
    for row, length in enumerate(lengths):
        other.fill(row, length - 1, k[row : row + 1], v[row : row + 1])
        for blocks in (cache.rows[row], written[row]):
            for ours, theirs in zip(blocks, other.rows[row], strict=True):
                if not torch.equal(ours, theirs):
                    raise Llama4Error(f"{(ours != theirs).sum().item()} bytes of row {row} differ from torch's")
        truths.append(_truth(q[row][None], *_stored(cache, row, length)))
    truth = torch.cat(truths)
    error = max(workload.relative(each, truth) for each in (out, together))
    return _held(error, 1e-5 if record.dry else 1e-2)


def _replayed(record: Record) -> Figures:
    """Lengths, slots and addresses are no part of a launch."""
    if record.device.type != "cuda":
        raise Skip("not a GPU")
    H, K, C = HEADS
    lengths = [3000, 3000, 3000]
    cache = _made(record, "bfloat16", lengths, HEADS)
    for row, length in enumerate(lengths):
        cache.fill(row, 0, *_normal(record, 2, length, K, C))
    q, (k, v) = _normal(record, 3, H, C), _normal(record, 2, 3, K, C)
    table, lengths_B = cache.block_table().clone(), torch.tensor([1, 2, 3], device=record.device)
    outputs: list[Tensor] = []

    def step() -> None:
        outputs.append(launch_attention.attend(q, table, lengths_B, K, "bfloat16", (k, v, lengths_B - 1)))

    replay = timing.graph(step, record.device)
    errors = []
    for other in ([2999, 1, 700], [5, 2000, 256]):
        table.copy_(table.flip(0))
        cache.rows.reverse()
        lengths_B.copy_(torch.tensor(other))
        replay()
        truth = [_truth(q[row][None], *_stored(cache, row, length)) for row, length in enumerate(other)]
        errors.append(workload.relative(outputs[-1], torch.cat(truth)))
    return _held(max(errors), 1e-2)


def _prompt(record: Record, kind: str) -> Figures:
    """Some tokens of a prompt, of which more was read than is read at once."""
    heads, past, new = (DRY_HEADS, 70, 5) if record.dry else (HEADS, 33000, 100)
    H, K, C = heads
    cache = _made(record, kind, [past], heads)
    cache.fill(0, 0, *_normal(record, 2, past, K, C))
    q, (k, v) = _normal(record, new, H, C), _normal(record, 2, new, K, C)
    with torch.inference_mode():
        out = causal_attention(q, k, v, cache, 0, past)
    stored = zip(_stored(cache, 0, past), (k, v), strict=True)
    keys, values = (torch.cat((old, added.transpose(0, 1)), dim=1) for old, added in stored)
    return _held(workload.relative(out, _truth(q, keys, values, new)), 1e-5 if record.dry else 1e-2)


def _rate(record: Record, kind: str, rows: int, keys: int) -> Figures:
    """One layer's step, the new token's write included; and with that in a launch of its own."""
    H, K, C = heads = DRY_HEADS if record.dry else HEADS
    cache = _made(record, kind, [keys] * rows, heads)
    q, (k, v) = _normal(record, rows, H, C), _normal(record, 2, rows, K, C)
    table, lengths_B = cache.block_table(), torch.full((rows,), keys, device=record.device)
    slots_B = lengths_B - 1

    def together() -> None:
        launch_attention.attend(q, table, lengths_B, K, kind, (k, v, slots_B))

    def apart() -> None:
        launch_attention.write(k, v, table, slots_B, kind)
        launch_attention.attend(q, table, lengths_B, K, kind)

    spent = [timing.seconds(timing.graph(step, record.device), record.device, 0.1, 100) for step in (together, apart)]
    figures = _figures(record, spent[0], rows * keys * cache.block_bytes // CACHE_BLOCK)
    return figures | {"apart_us": spent[1] * 1e6}


def _torch_rate(record: Record, rows: int, keys: int) -> Figures:
    """As if the cache were one tensor."""
    H, K, C = DRY_HEADS if record.dry else HEADS
    q, (k, v) = _normal(record, rows, H, 1, C), _normal(record, 2, rows, K, keys, C)
    step = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    spent = timing.seconds(timing.graph(step, record.device), record.device, 0.1, 100)
    return _figures(record, spent, k.nbytes + v.nbytes)


def _figures(record: Record, seconds: float, read: int) -> Figures:
    figures = {"us": seconds * 1e6, "gb_s": read / seconds / 1e9}
    most = record.rates.get("read_gb_s")
    return figures | ({"share_of_read": figures["gb_s"] / most} if most else {})
