"""Grouped-query attention of the decoder: RoPE layers in chunks, NoPE layers over everything with a temperature.

Shapes: N packed tokens, D hidden size, H query heads, K key/value heads, C head_dim, S keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.cache.formats import Unquantized
from llama4.cache.sequence import LayerCache
from llama4.config import TextConfig
from llama4.kernels import cpu
from llama4.model.batch import Batch, Step
from llama4.model.layers import attention_temperature, rope_rotation, turn, upcast
from llama4.ops.linear import Linear

QUERIES = 256
"""Queries that meet a past at once where that is done in plain torch: bounds the scores."""


class Turns:
    """What positions do to queries and keys, computed once per forward and shared by all layers."""

    def __init__(self, config: TextConfig, positions_N: Tensor, dtype: torch.dtype) -> None:
        precision = torch.promote_types(dtype, torch.float32)
        windows = {config.window(i) for i in range(config.num_hidden_layers) if config.uses_rope(i)}
        self.rotations = {w: rope_rotation(config, positions_N, w, precision) for w in windows}
        self.temperature = attention_temperature(config, positions_N, precision)


def softmax_attention(q_HNC: Tensor, k_KSC: Tensor, v_KSC: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q K^T / sqrt(C)) V, [H, N, C], and the logarithm of the softmax's denominator, [H, N]. Causal: the first
    query sees the first key, and so on."""
    group = q_HNC.shape[0] // k_KSC.shape[0]
    k_HSC, v_HSC = (x.repeat_interleave(group, dim=0) for x in (k_KSC, v_KSC))
    flash = _FLASH.get(q_HNC.device.type)
    if flash is not None and not torch.is_grad_enabled() and q_HNC.dtype in _FLASH_DTYPES[q_HNC.device.type]:
        out_1HNC, lse_1HN = flash(q_HNC[None], k_HSC[None], v_HSC[None], 0.0, causal)[:2]
        return out_1HNC[0], lse_1HN[0]
    outs, lses = [], []
    for i, q in enumerate(q_HNC.split(QUERIES, dim=1)):
        scores = upcast(q) @ upcast(k_HSC).mT * q.shape[2] ** -0.5
        if causal:
            ages = torch.arange(i * QUERIES, i * QUERIES + q.shape[1], device=q.device)[:, None]
            scores = scores.masked_fill(ages < torch.arange(k_HSC.shape[1], device=q.device), -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(((scores - lses[-1][..., None]).exp() @ upcast(v_HSC)).type_as(q))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


_FLASH: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    "cuda": torch.ops.aten._scaled_dot_product_flash_attention,
}
_FLASH_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}


def merged(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The attention over several sets of keys from the attention over each, as `softmax_attention` gives it."""
    (out, lse), *rest = parts
    for other, other_lse in rest:
        both = torch.logaddexp(lse, other_lse)
        out = upcast(out) * (lse - both).exp()[..., None] + upcast(other) * (other_lse - both).exp()[..., None]
        lse = both
    return out


def causal_attention(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cache: LayerCache | None = None, row: int = 0, past: int = 0
) -> Tensor:
    """New tokens of one row see each other causally, and the first `past` tokens that the cache holds of the row.

    Scale is C^-0.5. There is no mask, and nothing of N x S, however long either is. -> [N, H, C].
    """
    format = cache.format if cache is not None and past else Unquantized(q_NHC.dtype)
    if cpu.attention_usable(q_NHC, past + len(q_NHC), format):
        blocks = cache.addresses(row) if cache is not None and past else None
        return cpu.attend_causal(q_NHC, k_NKC, v_NKC, blocks, past, format.number)
    q_HNC, k_KNC, v_KNC = (x.transpose(0, 1) for x in (q_NHC, k_NKC, v_NKC))
    if not past or cache is None:
        q_1HNC, k_1KNC, v_1KNC = q_HNC[None], k_KNC[None], v_KNC[None]
        return F.scaled_dot_product_attention(q_1HNC, k_1KNC, v_1KNC, is_causal=True, enable_gqa=True)[0].transpose(
            0, 1
        )
    spans = cache.spans(row, past, q_HNC.dtype, q_HNC.device)
    parts = [softmax_attention(q_HNC, k_KNC, v_KNC, True)]
    out_HNC = merged(itertools.chain(parts, (softmax_attention(q_HNC, k, v, False) for k, v in spans)))
    return out_HNC.type_as(q_NHC).transpose(0, 1)


def step_attention(q_BHC: Tensor, cache: LayerCache, step: Step) -> Tensor:
    """One query per row against the keys that its row holds, its own included. -> [B, H, C]."""
    if cpu.attention_usable(q_BHC, step.longest, cache.format):
        return cpu.attend(q_BHC, cache.table(), step.lengths_B, cache.heads, cache.format.number)
    outs = []
    for row, (q_HC, slot) in enumerate(zip(q_BHC, step.slots, strict=True)):
        spans = cache.spans(row, slot + 1, q_HC.dtype, q_HC.device)
        outs.append(merged(softmax_attention(q_HC[:, None], k, v, False) for k, v in spans)[:, 0])
    return torch.stack(outs).type_as(q_BHC)


class Attention(nn.Module):
    """One layer's attention over packed tokens."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        self.uses_rope = config.uses_rope(layer)
        self.qk_norm_eps = config.rms_norm_eps if config.use_qk_norm and self.uses_rope else None
        self.uses_temperature = config.attn_temperature_tuning and not self.uses_rope
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_ND: Tensor, batch: Batch, turns: Turns, cache: LayerCache | None) -> Tensor:
        q_NHC, k_NKC, v_NKC = (
            projection(x_ND).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotation = turns.rotations[self.window] if self.uses_rope else None
        temperature = turns.temperature if self.uses_temperature else None
        q_NHC, k_NKC = turn(q_NHC, k_NKC, rotation, self.qk_norm_eps, temperature)
        out: Tensor = self.o_proj(self._attend(q_NHC, k_NKC, v_NKC, batch, cache).flatten(1))
        return out

    def _attend(self, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Batch, cache: LayerCache | None) -> Tensor:
        if cache is not None and batch.is_step:
            step = batch.step(self.window)
            for row, slot in enumerate(step.slots):
                cache.keep(row, slot, k_NKC[row : row + 1], v_NKC[row : row + 1])
            return step_attention(q_NHC, cache, step)
        pieces = []
        for segment in batch.segments(self.window):
            new = slice(segment.start, segment.end)
            q, k, v = q_NHC[new], k_NKC[new], v_NKC[new]
            pieces.append(causal_attention(q, k, v, cache, segment.row, segment.past))
            if cache is not None and segment.last:  # else nobody will ask for this chunk again
                cache.keep(segment.row, segment.past, k, v)
        return torch.cat(pieces) if pieces else q_NHC
