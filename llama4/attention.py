"""Grouped-query attention of the decoder: RoPE layers in chunks, NoPE layers over everything with a temperature.

Shapes: N packed tokens, D hidden size, H query heads, K key/value heads, C head_dim, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.cache import LayerCache
from llama4.config import TextConfig
from llama4.kernels import cpu
from llama4.kernels.dense import Linear
from llama4.layers import attention_temperature, rope_rotation, turn
from llama4.packing import Packing

QUERY_BLOCK = 1024
"""Queries that are masked at once when a piece of a prompt meets a past: bounds the mask to QUERY_BLOCK x S."""


class Turns:
    """What positions do to queries and keys, computed once per forward and shared by all layers."""

    def __init__(self, config: TextConfig, packing: Packing, dtype: torch.dtype) -> None:
        precision = torch.promote_types(dtype, torch.float32)
        windows = {config.window(i) for i in range(config.num_hidden_layers) if config.uses_rope(i)}
        positions = packing.positions_N
        self.rotations = {w: rope_rotation(config, positions, w, precision) for w in windows}
        self.temperature = attention_temperature(config, positions, precision)


def causal_attention(q_HNC: Tensor, k_KSC: Tensor, v_KSC: Tensor) -> Tensor:
    """Softmax attention in which the last query sees all S keys, the one before it all but the last, and so on.

    Scale is C^-0.5. Never builds a mask of N x S for long inputs: without a past the kernel knows the pattern, with
    one the queries go in blocks. [H, N, C] -> [H, N, C].
    """
    queries, keys = q_HNC.shape[1], k_KSC.shape[1]
    k, v = k_KSC[None], v_KSC[None]
    if queries == keys:
        return F.scaled_dot_product_attention(q_HNC[None], k, v, is_causal=True, enable_gqa=True)[0]
    past, blocks = keys - queries, []
    for start in range(0, queries, QUERY_BLOCK):
        q = q_HNC[None, :, start : start + QUERY_BLOCK]
        end = past + start + q.shape[2]
        ages = torch.arange(end, device=q.device) - torch.arange(past + start, end, device=q.device)[:, None]
        blocks.append(F.scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end], ages <= 0, enable_gqa=True)[0])
    return torch.cat(blocks, dim=1)


def step_attention(q_BHC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, lengths_B: Tensor, ragged: bool) -> Tensor:
    """One query per row against the first `lengths` keys of that row; the queries of a group share their key head.
    -> [B, H, C]."""
    B, H, C = q_BHC.shape
    if k_BKSC.dtype == q_BHC.dtype and cpu.heads_usable(q_BHC, k_BKSC, v_BKSC):
        return cpu.attend(q_BHC, k_BKSC, v_BKSC, lengths_B)
    mask = None
    if ragged:
        mask = (torch.arange(k_BKSC.shape[2], device=lengths_B.device) < lengths_B[:, None])[:, None, None]
    grouped = q_BHC.view(B, k_BKSC.shape[1], -1, C)
    keys, values = k_BKSC.to(q_BHC.dtype), v_BKSC.to(q_BHC.dtype)
    return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(B, H, C)


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

    def forward(self, x_ND: Tensor, packing: Packing, turns: Turns, cache: LayerCache | None) -> Tensor:
        q_NHC, k_NKC, v_NKC = (
            projection(x_ND).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotation = turns.rotations[self.window] if self.uses_rope else None
        temperature = turns.temperature if self.uses_temperature else None
        q_NHC, k_NKC = turn(q_NHC, k_NKC, rotation, self.qk_norm_eps, temperature)
        out: Tensor = self.o_proj(self._attend(q_NHC, k_NKC, v_NKC, packing, cache).flatten(1))
        return out

    def _attend(
        self, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, packing: Packing, cache: LayerCache | None
    ) -> Tensor:
        if cache is not None and packing.is_step:
            step = packing.step(self.window)
            keys, values = cache.step(step, k_NKC, v_NKC)
            return step_attention(q_NHC, keys, values, step.lengths_B, step.is_ragged)
        pieces = []
        for segment in packing.segments(self.window):
            new = slice(segment.start, segment.end)
            if cache is None:
                k_KSC, v_KSC = k_NKC[new].transpose(0, 1), v_NKC[new].transpose(0, 1)
            else:
                k_KSC, v_KSC = cache.extend(segment, k_NKC[new], v_NKC[new])
            pieces.append(causal_attention(q_NHC[new].transpose(0, 1), k_KSC.to(q_NHC.dtype), v_KSC.to(q_NHC.dtype)))
        return torch.cat(pieces, dim=1).transpose(0, 1) if pieces else q_NHC
