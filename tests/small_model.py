"""A random model with every part of Llama 4, small enough to run in milliseconds, and its directory."""

from __future__ import annotations

import base64
import itertools
import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llama4.config import Llama4Config, RopeScaling, TextConfig
from llama4.model.multimodal import Llama4Model
from llama4.vision.config import VisionConfig

RANKS, SPECIAL = 896, 128


def layers(model: Llama4Model) -> list[Any]:
    """Of the decoder; typed as anything, for tests that reach into them."""
    return list(model.language_model.model.layers)


def config() -> Llama4Config:
    """Chunks of 32 tokens, 8 experts, one layer without RoPE, tiles of 28 pixels that are one token each."""
    text = TextConfig(
        vocab_size=RANKS + SPECIAL,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=4096,
        num_local_experts=8,
        rope_scaling=RopeScaling(original_max_position_embeddings=32),
        attention_chunk_size=32,
        floor_scale=32,
        bos_token_id=RANKS,
        eos_token_id=(RANKS + 1, RANKS + 7, RANKS + 8),
        pad_token_id=RANKS + 18,
    )
    vision = VisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vision_output_dim=24,
        projector_input_dim=24,
        projector_output_dim=24,
        image_size=28,
        max_tiles=4,
    )
    return Llama4Config(text, vision, RANKS + 80, RANKS + 81, RANKS + 92, dtype="float32")


def with_two_layers(config: Llama4Config) -> Llama4Config:
    """The same but for its depth; the second layer has no RoPE."""
    text = replace(config.text, num_hidden_layers=2, no_rope_layers=(1, 0), moe_layers=None, layer_types=None)
    return replace(config, text=text)


def model(seed: int = 0, *, ends: bool = False) -> Llama4Model:
    """Random weights; unless `ends`, the greedy choice is never a special token, so that replies run to their limit."""
    built = Llama4Model(config()).eval()
    built.init_weights(torch.Generator().manual_seed(seed))
    if not ends:
        with torch.no_grad():
            built.language_model.lm_head.weight[RANKS:] = 0
    return built


def write_tokenizer(path: Path) -> Path:
    """All bytes, and 640 pairs of letters."""
    pairs = [(a + b).encode() for a, b in itertools.product(string.ascii_lowercase, repeat=2)]
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs][:RANKS]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def write(directory: Path, seed: int = 0) -> Path:
    """A checkpoint in Hugging Face's layout, with a tokenizer.model; not written by the library's own writers."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model(seed).state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config().to_dict()))
    (directory / "preprocessor_config.json").write_text(json.dumps(config().preprocessor_dict()))
    write_tokenizer(directory / "tokenizer.model")
    return directory
