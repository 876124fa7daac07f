"""The shapes of the released Llama 3.2 Vision models, by name. Source: their config.json, as Meta published it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from llama4.config import Llama4Config, RopeScaling, TextConfig
from llama4.vision.tiled_config import TiledVisionConfig

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def layer_kinds(layers: int, cross: Collection[int]) -> dict[str, Any]:
    """The fields of `TextConfig` that say which layers are of cross-attention."""
    kinds = tuple("cross_attention" if i in cross else "full_attention" for i in range(layers))
    return {"layer_types": kinds, "no_rope_layers": tuple(int(i not in cross) for i in range(layers))}


def _vision_model(layers: int, width: int, heads: int, mlp: int) -> Llama4Config:
    text = TextConfig(
        vocab_size=128256,
        extra_embeddings=8,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=width // heads,
        intermediate_size=0,
        intermediate_size_mlp=mlp,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        num_local_experts=0,
        use_qk_norm=False,
        attention_chunk_size=None,
        attn_temperature_tuning=False,
        bos_token_id=128000,
        eos_token_id=(128001, 128008, 128009),
        pad_token_id=128004,
        **layer_kinds(layers, range(3, layers, 5)),
    )
    vision = TiledVisionConfig(image_mean=CLIP_MEAN, image_std=CLIP_STD)
    return Llama4Config(text, vision, -1, -1, 128256, family="mllama")


PRESETS: Mapping[str, Callable[[], Llama4Config]] = {
    "llama-3.2-11b-vision": partial(_vision_model, 40, 4096, 32, 14336),
    "llama-3.2-90b-vision": partial(_vision_model, 100, 8192, 64, 28672),
}
"""By the names that people write."""
