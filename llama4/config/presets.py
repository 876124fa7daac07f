"""The shapes of the released models, of Behemoth and of the embedded model, by name."""

from __future__ import annotations

from collections.abc import Callable

from llama4.config.model import Llama4Config
from llama4.config.rope import RopeScaling
from llama4.config.text import TextConfig
from llama4.vision.config import VisionConfig


def scout() -> Llama4Config:
    """Llama 4 Scout 17B-16E: 109B parameters, 17B active, a context of 10M tokens."""
    return Llama4Config(text=TextConfig(rope_scaling=RopeScaling()))


def maverick() -> Llama4Config:
    """Llama 4 Maverick 17B-128E: 400B parameters, 17B active, a context of 1M tokens."""
    text = TextConfig(
        num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False, max_position_embeddings=1048576
    )
    return Llama4Config(text=text)


def guard4() -> Llama4Config:
    """Llama Guard 4: Scout's shape without routed experts, RoPE and full attention on every layer."""
    text = TextConfig(
        intermediate_size_mlp=8192,
        num_local_experts=0,
        moe_layers=(),
        no_rope_layers=(1,) * 48,
        attention_chunk_size=None,
        attn_temperature_tuning=False,
        rope_scaling=RopeScaling(factor=8.0),
        max_position_embeddings=131072,
    )
    return Llama4Config(
        text=text, note="12B parameters; RoPE scaling follows the released configuration as far as it is known."
    )


def behemoth() -> Llama4Config:
    """A model of the announced, unreleased Behemoth's size: 16 experts, about 2T parameters, 288B active."""
    text = TextConfig(
        hidden_size=16384,
        intermediate_size=26368,
        num_hidden_layers=88,
        num_attention_heads=128,
        num_key_value_heads=16,
        rope_scaling=RopeScaling(),
        max_position_embeddings=1048576,
    )
    note = (
        "Behemoth was announced with 16 experts, about 2T parameters and 288B active, and not released. Layers, "
        "widths, heads and context are guessed so that those three numbers come out."
    )
    return Llama4Config(text=text, note=note)


def tiny() -> Llama4Config:
    """The embedded model: every part of Llama 4 at a width that two CPU cores can train from scratch."""
    first = 896
    text = TextConfig(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1048576,
        num_local_experts=8,
        attention_chunk_size=512,
        floor_scale=512,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=512),
        bos_token_id=first,
        eos_token_id=(first + 1, first + 7, first + 8),
        pad_token_id=first + 18,
    )
    vision = VisionConfig(
        hidden_size=160,
        num_hidden_layers=6,
        num_attention_heads=5,
        intermediate_size=640,
        vision_output_dim=256,
        projector_input_dim=256,
        projector_output_dim=256,
        image_size=112,
        max_tiles=4,
    )
    return Llama4Config(
        text=text,
        vision=vision,
        boi_token_index=first + 80,
        eoi_token_index=first + 81,
        image_token_index=first + 92,
    )


PRESETS: dict[str, Callable[[], Llama4Config]] = {
    "scout": scout,
    "maverick": maverick,
    "guard4": guard4,
    "behemoth": behemoth,
    "tiny": tiny,
}
