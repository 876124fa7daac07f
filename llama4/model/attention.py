"""Grouped-query attention of the decoder: RoPE layers in chunks, NoPE layers over everything with a temperature; of
Mistral all layers in a window that slides.

Shapes: N packed tokens, D hidden size, H query heads, K key/value heads, C head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.cache.batch import Batch
from llama4.cache.view import LayerView
from llama4.config import TextConfig
from llama4.config.window import SlidingWindow
from llama4.model.positions import PositionFactors
from llama4.ops.attention import causal_attention, decode_attention, sliding_attention
from llama4.ops.linear import Linear, linears
from llama4.ops.rope import apply_rope


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

    def forward(self, x_ND: Tensor, batch: Batch, factors: PositionFactors, cache: LayerView | None) -> Tensor:
        projected = linears((self.q_proj, self.k_proj, self.v_proj), x_ND)
        q_NHC, k_NKC, v_NKC = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        rotation = factors.rotations[self.window] if self.uses_rope else None
        temperature = factors.temperature_N if self.uses_temperature else None
        q_NHC, k_NKC = apply_rope(q_NHC, k_NKC, rotation, self.qk_norm_eps, temperature)
        out: Tensor = self.o_proj(self._attend(q_NHC, k_NKC, v_NKC, batch, cache).flatten(1))
        return out

    def _attend(self, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Batch, cache: LayerView | None) -> Tensor:
        spans = batch.spans(self.window)
        if cache is not None and batch.is_decode:
            cache.write(k_NKC, v_NKC)
            lengths = [span.past + 1 for span in spans]
            return decode_attention(q_NHC, cache.blocks, lengths, batch.key_lengths(self.window))
        outputs = []
        for span in spans:
            new = slice(span.begin, span.end)
            blocks = cache.blocks if cache is not None else None
            q, k, v = q_NHC[new], k_NKC[new], v_NKC[new]
            if isinstance(self.window, SlidingWindow):
                outputs.append(sliding_attention(q, k, v, self.window, blocks, span.row, span.before))
            else:
                outputs.append(causal_attention(q, k, v, blocks, span.row, span.past))
        if cache is not None:
            cache.write(k_NKC, v_NKC)
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs) if outputs else q_NHC
