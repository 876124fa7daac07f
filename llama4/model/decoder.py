"""The decoder: layers of attention and feed-forward blocks over packed tokens, and the language model's head.

Module names are those of Hugging Face's checkpoints, so a parameter's name is its key on disk.

Shapes: N packed tokens (see cache/batch.py), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama4.cache.batch import Batch
from llama4.cache.view import CacheView, LayerView
from llama4.config import TextConfig
from llama4.model.attention import Attention
from llama4.model.cross_attention import CrossAttentionLayer
from llama4.model.experts import Experts
from llama4.model.feed_forward import FeedForward
from llama4.model.moe import MixtureOfExperts
from llama4.model.norm import RMSNorm, add_and_norm
from llama4.model.positions import PositionFactors
from llama4.ops.linear import Linear
from llama4.ops.precision import upcast
from llama4.progress import track
from llama4.vision.encoder import run


class DecoderLayer(nn.Module):
    """Residual pre-norm block: h = x + attn(norm(x)); out = h + ffn(norm(h))."""

    def __init__(self, config: TextConfig, layer: int, experts: type[Experts]) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.feed_forward = (
            MixtureOfExperts(config, experts)
            if config.uses_experts(layer)
            else FeedForward(config.hidden_size, config.intermediate_size_mlp, config.mlp_bias)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_ND: Tensor, batch: Batch, factors: PositionFactors, cache: LayerView | None) -> Tensor:
        attended_ND = self.self_attn(self.input_layernorm(x_ND), batch, factors, cache)
        x_ND, normed_ND = add_and_norm(x_ND, attended_ND, self.post_attention_layernorm)
        out: Tensor = x_ND + self.feed_forward(normed_ND)
        return out


LAYERS: dict[str, type[DecoderLayer | CrossAttentionLayer]] = {
    "chunked_attention": DecoderLayer,
    "full_attention": DecoderLayer,
    "cross_attention": CrossAttentionLayer,
}
"""Kind of a layer in `TextConfig.layer_types` -> its module."""


class Decoder(nn.Module):
    """Embeddings, layers and final norm, over packed tokens.

    Attributes:
        run_layer: `run`, or `run_recomputed` in training that saves memory.
    """

    def __init__(self, config: TextConfig, experts: type[Experts]) -> None:
        super().__init__()
        self.config = config
        sizes = config.num_embeddings, config.hidden_size
        self.embed_tokens = nn.Embedding(*sizes, _weight=torch.empty(sizes))  # drawn on meta it imports sympy
        kinds = enumerate(config.layer_types or ())
        self.layers = nn.ModuleList(LAYERS[kind](config, i, experts) for i, kind in kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.run_layer: Callable[..., Tensor] = run

    def forward(self, x_ND: Tensor, batch: Batch, cache: CacheView | None) -> Tensor:
        factors = PositionFactors.of_batch(self.config, batch, self.norm.weight.dtype)
        x_ND = upcast(x_ND)  # what the layers add would be rounded twice per layer: the largest error of bfloat16
        for i, layer in enumerate(track(self.layers)):
            x_ND = self.run_layer(layer, x_ND, batch, factors, cache.of_layer[i] if cache is not None else None)
        out: Tensor = self.norm(x_ND)
        return out


class LanguageModel(nn.Module):
    """The decoder and its head."""

    def __init__(self, config: TextConfig, experts: type[Experts]) -> None:
        super().__init__()
        self.model = Decoder(config, experts)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
