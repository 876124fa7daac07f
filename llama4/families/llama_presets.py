"""The shapes of the released dense models, by name. Sources: Meta's papers and params.json; config.json of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from llama4.config import Llama4Config, RopeScaling, TextConfig


def dense(text: Mapping[str, Any]) -> Llama4Config:
    """A configuration of this family, of the fields of `TextConfig` that dense models differ in."""
    layers, width, heads = text["num_hidden_layers"], text["hidden_size"], text["num_attention_heads"]
    usual: dict[str, Any] = {
        **{"num_key_value_heads": heads, "head_dim": width // heads, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
        **{"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": (2,), "pad_token_id": None},
        **{"intermediate_size": 0, "num_local_experts": 0, "use_qk_norm": False, "attn_temperature_tuning": False},
        **{"no_rope_layers": (1,) * layers, "layer_types": ("full_attention",) * layers, "attention_chunk_size": None},
    }
    return Llama4Config(TextConfig(**{**usual, **text}), vision=None, image_token_index=-1, family="llama")


def _model(layers: int, width: int, heads: int, mlp: int, window: int, **rest: Any) -> Callable[[], Llama4Config]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return partial(dense, {**sizes, "intermediate_size_mlp": mlp, "max_position_embeddings": window, **rest})


_LLAMA3 = {
    **{"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0},
    **{"bos_token_id": 128000, "eos_token_id": (128001, 128008, 128009), "pad_token_id": 128004},
}
_LLAMA31 = {**_LLAMA3, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)}
_LLAMA32 = {**_LLAMA3, "rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), "tie_word_embeddings": True}
_CODE = {"rope_theta": 1e6}
_SMOL = {"vocab_size": 49152, "rope_theta": 1e5, "tie_word_embeddings": True, "pad_token_id": 2}

PRESETS: Mapping[str, Callable[[], Llama4Config]] = {
    "llama-7b": _model(32, 4096, 32, 11008, 2048, rms_norm_eps=1e-6),
    "llama-13b": _model(40, 5120, 40, 13824, 2048, rms_norm_eps=1e-6),
    "llama-30b": _model(60, 6656, 52, 17920, 2048, rms_norm_eps=1e-6),
    "llama-65b": _model(80, 8192, 64, 22016, 2048),
    "open-llama-3b": _model(26, 3200, 32, 8640, 2048, rms_norm_eps=1e-6),
    "open-llama-7b": _model(32, 4096, 32, 11008, 2048, rms_norm_eps=1e-6),
    "open-llama-13b": _model(40, 5120, 40, 13824, 2048, rms_norm_eps=1e-6),
    "llama-2-7b": _model(32, 4096, 32, 11008, 4096),
    "llama-2-13b": _model(40, 5120, 40, 13824, 4096),
    "llama-2-70b": _model(80, 8192, 64, 28672, 4096, num_key_value_heads=8),
    "code-llama-7b": _model(32, 4096, 32, 11008, 16384, vocab_size=32016, **_CODE),
    "code-llama-13b": _model(40, 5120, 40, 13824, 16384, vocab_size=32016, **_CODE),
    "code-llama-34b": _model(48, 8192, 64, 22016, 16384, num_key_value_heads=8, **_CODE),
    "code-llama-70b": _model(80, 8192, 64, 28672, 16384, vocab_size=32016, num_key_value_heads=8, **_CODE),
    "llama-3-8b": _model(32, 4096, 32, 14336, 8192, **_LLAMA3),
    "llama-3-70b": _model(80, 8192, 64, 28672, 8192, **_LLAMA3),
    "llama-3.1-8b": _model(32, 4096, 32, 14336, 131072, **_LLAMA31),
    "llama-3.1-70b": _model(80, 8192, 64, 28672, 131072, **_LLAMA31),
    "llama-3.1-405b": _model(126, 16384, 128, 53248, 131072, **_LLAMA31),
    "llama-3.2-1b": _model(16, 2048, 32, 8192, 131072, **_LLAMA32),
    "llama-3.2-3b": _model(28, 3072, 24, 8192, 131072, **_LLAMA32),
    "llama-3.3-70b": _model(80, 8192, 64, 28672, 131072, **_LLAMA31),
    "smollm2-135m": _model(30, 576, 9, 1536, 8192, num_key_value_heads=3, **_SMOL),
    "smollm2-360m": _model(32, 960, 15, 2560, 8192, num_key_value_heads=5, **_SMOL),
    "smollm2-1.7b": _model(24, 2048, 32, 8192, 8192, **{**_SMOL, "rope_theta": 130000.0}),
}
"""By the names that people write."""
