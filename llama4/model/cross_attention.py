"""A decoder layer whose keys and values come from pictures: Llama 3.2 Vision's.

Shapes: N packed tokens, of which X see a picture; D hidden size, H query heads, K key/value heads, C head_dim, S
patches of a picture's tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.cache.batch import Batch
from llama4.cache.pictures import PictureView, Sight
from llama4.config import TextConfig
from llama4.model.experts import Experts
from llama4.model.feed_forward import FeedForward
from llama4.model.norm import RMSNorm
from llama4.model.positions import PositionFactors
from llama4.ops.attention import softmax_attention
from llama4.ops.linear import Linear, linears


class CrossAttention(nn.Module):
    """Attention of tokens to the patches of pictures: without positions, with norms of queries and keys."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim, self.key_heads = config.head_dim, config.num_key_value_heads
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=False)
        self.k_proj = Linear(config.hidden_size, keys, bias=False)
        self.v_proj = Linear(config.hidden_size, keys, bias=False)
        self.o_proj = Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, features_SD: Tensor) -> Tensor:
        """Of one picture, [2, K, S, C]."""
        projected = linears((self.k_proj, self.v_proj), features_SD)
        k_SKC, v_SKC = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        return torch.stack((self.k_norm(k_SKC), v_SKC)).transpose(1, 2).contiguous()

    def forward(self, x_XD: Tensor, sight: Sight, cache: PictureView | None) -> Tensor:
        """[X, D] -> [X, D]; the tokens are those of `sight.looks`, in order."""
        new = [[self.keys_values(picture.features) for picture in row] for row in sight.new]
        seen = new
        if cache is not None:
            cache.write(new)
            seen = [[*cache.read(row), *own] for row, own in enumerate(new)]
        q_XHC = self.q_norm(self.q_proj(x_XD).unflatten(-1, (-1, self.head_dim)))
        outputs = []
        for look, q_NHC in zip(sight.looks, q_XHC.split([look.end - look.begin for look in sight.looks]), strict=True):
            pictures = seen[look.row][look.first : look.last]
            keys, values = pictures[0] if len(pictures) == 1 else torch.cat(pictures, dim=2)
            # All queries see all keys, so the heads that share keys are so many more queries.
            grouped = q_NHC.unflatten(1, (self.key_heads, -1)).transpose(0, 1)
            out = softmax_attention(grouped.flatten(1, 2), keys, values, causal=False)[0]
            outputs.append(out.view_as(grouped).transpose(0, 1).flatten(1))
        attended: Tensor = self.o_proj(torch.cat(outputs))
        return attended


class CrossAttentionLayer(nn.Module):
    """h = x + tanh(gate) attn(norm(x)); out = h + tanh(gate) ffn(norm(h)), for tokens that see a picture. Others stay
    as they are.

    Source: `CrossAttentionTransformerBlock` in models/llama3/multimodal/model.py of Meta's llama-models. In
    transformers 5.23 a token before all pictures attends to everything, empty tiles included, and only its feed-forward
    is silent.
    """

    def __init__(self, config: TextConfig, layer: int, experts: type[Experts]) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size_mlp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_ND: Tensor, batch: Batch, factors: PositionFactors, cache: PictureView | None) -> Tensor:
        if (sight := batch.sight) is None:
            return x_ND
        x_XD = x_ND[sight.tokens]
        attended = self.cross_attn(self.input_layernorm(x_XD), sight, cache)
        x_XD = x_XD + self.cross_attn_attn_gate.tanh() * attended
        x_XD = x_XD + self.cross_attn_mlp_gate.tanh() * self.feed_forward(self.post_attention_layernorm(x_XD))
        return x_ND.index_copy(0, sight.tokens, x_XD)
