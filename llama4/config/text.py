"""The shape of the decoder, in Hugging Face's field names, and what it must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama4.config.rope import RopeScaling, read_scaling
from llama4.config.window import SlidingWindow, visible_tokens
from llama4.errors import ConfigError
from llama4.reading import LIMITS

LAYER_TYPES = frozenset({"chunked_attention", "full_attention", "cross_attention"})
CACHE_BLOCK = 256
"""Tokens in a block of the key/value cache; memory is taken a block at a time."""


@dataclass(frozen=True)
class TextConfig:
    """The decoder. The defaults are Llama 4 Scout's.

    `no_rope_layers[i]` is 1 where layer i USES RoPE (the name is Hugging Face's); `moe_layers` lists the layers with
    experts; `layer_types[i]` is "chunked_attention", "full_attention" or "cross_attention", which sees pictures alone.
    Where they are None, the first two follow from their intervals and the third from the first (layers with RoPE are
    chunked). After construction they are tuples.

    Raises:
        ConfigError: shapes that do not fit together.
    """

    vocab_size: int = 202048
    extra_embeddings: int = 0
    """Rows of the embeddings behind the vocabulary, for tokens that the head never gives."""
    hidden_size: int = 5120
    intermediate_size: int = 8192
    """Width of every expert's MLP, the shared expert's included."""
    intermediate_size_mlp: int = 16384
    """Width of the MLP in layers without experts."""
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 10485760
    """The longest context, prompt and reply together, in tokens."""
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    """Biases of the MLPs; experts have none."""
    num_experts_per_tok: int = 1
    num_local_experts: int = 16
    moe_layers: tuple[int, ...] | None = None
    interleave_moe_layer_step: int = 1
    use_qk_norm: bool = True
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4
    attention_chunk_size: int | None = 8192
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    """Tokens that a token sees in every layer, itself included; None for no such limit."""
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    bos_token_id: int | None = 200000
    eos_token_id: tuple[int, ...] = (200001, 200007, 200008)
    pad_token_id: int | None = 200018

    def __post_init__(self) -> None:
        layers, interval = self.num_hidden_layers, self.no_rope_layer_interval
        if layers > LIMITS["num_hidden_layers"]:
            raise ConfigError(f"num_hidden_layers is {layers:,}; it may be at most {LIMITS['num_hidden_layers']:,}")
        if not self.no_rope_layers and interval < 1:
            raise ConfigError(
                f"no_rope_layer_interval must be at least 1, not {interval}, where no_rope_layers does not say which "
                "layers use RoPE"
            )
        if self.num_local_experts == 0:
            moe: tuple[int, ...] = ()
        elif self.moe_layers is None:
            if self.interleave_moe_layer_step < 1:
                raise ConfigError(
                    f"interleave_moe_layer_step must be at least 1, not {self.interleave_moe_layer_step}, where "
                    "moe_layers does not say which layers have experts"
                )
            moe = tuple(range(self.interleave_moe_layer_step - 1, layers, self.interleave_moe_layer_step))
        else:
            moe = tuple(self.moe_layers)
        rope = tuple(self.no_rope_layers or (int((i + 1) % interval != 0) for i in range(layers)))[:layers]
        kinds = self.layer_types or ("chunked_attention" if uses_rope else "full_attention" for uses_rope in rope)
        set_field = object.__setattr__
        set_field(self, "moe_layers", moe)
        set_field(self, "no_rope_layers", rope)
        set_field(self, "layer_types", tuple(kinds))
        set_field(self, "attn_temperature_tuning", bool(self.attn_temperature_tuning))
        self._check()

    def _check(self) -> None:
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        positive += ["head_dim", "max_position_embeddings", "floor_scale"]
        if self.moe_layers:
            positive += ["intermediate_size", "num_experts_per_tok"]
        if len(self.moe_layers or ()) < self.num_hidden_layers:
            positive.append("intermediate_size_mlp")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta must be above 0, not {self.rope_theta}")
        if not self.rms_norm_eps >= 0:
            raise ConfigError(f"rms_norm_eps must be at least 0, not {self.rms_norm_eps}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even (RoPE rotates pairs), not {self.head_dim}")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.head_dim, self.rope_theta)
        if self.moe_layers and self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_local_experts {self.num_local_experts}"
            )
        if self.attention_chunk_size is not None and self.attention_chunk_size < 1:
            raise ConfigError(f"attention_chunk_size must be at least 1 or null, not {self.attention_chunk_size}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window must be at least 1 or null, not {self.sliding_window}")
        for name, values in (("no_rope_layers", self.no_rope_layers), ("layer_types", self.layer_types)):
            if values is None or len(values) != self.num_hidden_layers:
                raise ConfigError(f"{name} must name all {self.num_hidden_layers} layers, not {values}")
        if unknown := set(self.layer_types or ()) - LAYER_TYPES:
            raise ConfigError(f"layer_types may hold {', '.join(sorted(LAYER_TYPES))}, not {sorted(unknown)}")
        if any(self.is_cross(i) and (self.uses_rope(i) or self.uses_experts(i)) for i in range(self.num_hidden_layers)):
            raise ConfigError("a layer of cross-attention has neither RoPE nor experts")
        if any(not 0 <= i < self.num_hidden_layers for i in self.moe_layers or ()):
            raise ConfigError(
                f"moe_layers {self.moe_layers} names layers beyond the {self.num_hidden_layers} there are"
            )

    def uses_rope(self, layer: int) -> bool:
        assert self.no_rope_layers is not None
        return bool(self.no_rope_layers[layer])

    def uses_experts(self, layer: int) -> bool:
        assert self.moe_layers is not None
        return layer in self.moe_layers

    def is_cross(self, layer: int) -> bool:
        """Whether a layer's keys come from pictures, not from tokens."""
        assert self.layer_types is not None
        return self.layer_types[layer] == "cross_attention"

    @property
    def cross_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_cross(i))

    @property
    def self_layers(self) -> tuple[int, ...]:
        """Layers whose keys come from tokens."""
        return tuple(i for i in range(self.num_hidden_layers) if not self.is_cross(i))

    @property
    def num_embeddings(self) -> int:
        """Ids that can be read; those from `vocab_size` on are never written."""
        return self.vocab_size + self.extra_embeddings

    def window(self, layer: int) -> int | None:
        """Tokens in a chunk of a layer's attention, or in the window that slides over all layers, or None where a token
        sees every token before it: see window.py."""
        assert self.layer_types is not None
        if self.sliding_window is not None:
            return SlidingWindow(self.sliding_window)
        return self.attention_chunk_size if self.layer_types[layer] == "chunked_attention" else None

    def visible_tokens(self, layer: int, num_tokens: int) -> int:
        """How many tokens the last of `num_tokens` sees in a layer, itself included; none where it sees pictures."""
        if self.is_cross(layer):
            return 0
        return visible_tokens(num_tokens - 1, self.window(layer)) if num_tokens else 0

    def scaled(self, rope_scaling: Mapping[str, Any]) -> TextConfig:
        """The same with another scaling of RoPE, and the window that it gives.

        Args:
            rope_scaling: as in config.json; `original_max_position_embeddings` is by default the window of the model.

        Raises:
            ConfigError: a scaling that cannot be.
        """
        before = self.rope_scaling
        window = before.original_max_position_embeddings if before is not None else self.max_position_embeddings
        scaling = read_scaling(rope_scaling, window, "rope_scaling")
        if scaling is None:
            return replace(self, rope_scaling=None, max_position_embeddings=window)
        grown = int(scaling.factor * scaling.original_max_position_embeddings)
        return replace(self, rope_scaling=scaling, max_position_embeddings=max(self.max_position_embeddings, grown))

    def activation_bytes(self, size: int, ranks: int = 1) -> float:
        """Bytes beside weights and cache that a token takes while some go through a layer together, without gradients.

        The residual stream is float32, everything else has the model's dtype. Each token has at most: the residual
        stream and its norm; in attention, queries and keys before and after RoPE, values, and the output; or in the
        feed-forward layer, gate, up and their product, inputs and outputs of the routed experts, and their sum with the
        shared expert in float32.

        Args:
            size: bytes of a number in the model's dtype.
            ranks: devices that split heads and widths (tensor parallel).
        """
        D, k, residual = self.hidden_size, self.num_experts_per_tok, max(4, size)
        attention = size * (3 * self.num_attention_heads + 4 * self.num_key_value_heads) * self.head_dim / ranks
        dense = size * 3 * self.intermediate_size_mlp / ranks
        experts = size * k * 3 * self.intermediate_size / ranks + size * 2 * k * D + residual * (1 + k) * D
        layers = range(self.num_hidden_layers)
        widest = max([attention, *(experts if self.uses_experts(i) else dense for i in layers)])
        return (residual + size) * D + widest

    def num_parameters(self) -> int:
        return self._count(self.num_local_experts)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all but the routed experts it is not sent to."""
        return self._count(self.num_experts_per_tok)

    def _count(self, experts: int) -> int:
        """Parameters with so many routed experts in each layer that has any."""
        width = self.hidden_size
        expert = 3 * width * self.intermediate_size
        moe = (experts + 1) * expert + width * self.num_local_experts
        dense = 3 * width * self.intermediate_size_mlp
        dense += (2 * self.intermediate_size_mlp + width) if self.mlp_bias else 0
        mlps = sum(moe if self.uses_experts(i) else dense for i in range(self.num_hidden_layers))
        norms = (2 * self.num_hidden_layers + 1) * width
        embeddings = self.num_embeddings * width + (0 if self.tie_word_embeddings else self.vocab_size * width)
        norms += len(self.cross_layers) * (2 * self.head_dim + 2)  # of queries and keys, and two gates
        return embeddings + self.num_hidden_layers * self._attention_parameters() + mlps + norms

    def _attention_parameters(self) -> int:
        width, queries = self.hidden_size, self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        bias = (queries + 2 * keys + width) if self.attention_bias else 0
        return width * (2 * queries + 2 * keys) + bias
