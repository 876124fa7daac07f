"""Small random models built with transformers, the reference for ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Llama4Config as ReferenceConfig
from transformers import Llama4ForConditionalGeneration as ReferenceModel

from llama4.config import Llama4Config
from llama4.model.multimodal import Llama4Model

__all__ = ["ReferenceConfig", "ReferenceModel"]

PATCH = 509
VOCABULARY = 512
CHUNK = 32

SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
MAVERICK_ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def reference_config(maverick: bool = False, **text: Any) -> ReferenceConfig:
    """Scout's logic, or Maverick's, with chunks of 32 tokens and tiles of 56 pixels (4 tokens each)."""
    text_config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 128,
        "intermediate_size_mlp": 176,
        "num_local_experts": 4,
        "attention_chunk_size": CHUNK,
        "floor_scale": 16,
        "max_position_embeddings": 16384,
        "interleave_moe_layer_step": 2 if maverick else 1,
        "use_qk_norm": not maverick,
        "rope_parameters": MAVERICK_ROPE if maverick else SCOUT_ROPE,
        "bos_token_id": 500,
        "eos_token_id": 501,
        "pad_token_id": 502,
    }
    vision_config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 56,
        "patch_size": 14,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return ReferenceConfig(text_config=text_config | text, vision_config=vision_config, image_token_index=PATCH)


def reference_model(config: ReferenceConfig, seed: int = 0) -> ReferenceModel:
    """Random weights, large enough that every part matters."""
    model = ReferenceModel._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.normal_(0.0, 0.08, generator=generator)
    return model


def write_mixed(directory: Path, **text: Any) -> Path:
    """A checkpoint in bfloat16 with all that a compiled step knows, of widths that four bits take: two experts per
    token, one dense layer in two, RoPE with and without."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256, "head_dim": 32}
    config = reference_config(**sizes, num_experts_per_tok=2, interleave_moe_layer_step=2, **text)
    reference_model(config, 3).bfloat16().save_pretrained(directory)
    return directory


def wide_model(hidden_size: int, seed: int = 0) -> Llama4Model:
    """Ours, in float32, of eight layers with random weights by which a product is about as large as its inputs."""
    sizes: dict[str, Any] = {"intermediate_size": hidden_size, "intermediate_size_mlp": hidden_size, "head_dim": 128}
    heads = hidden_size // sizes["head_dim"]
    config = reference_config(
        **sizes,
        hidden_size=hidden_size,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        attention_chunk_size=8192,
    )
    model = Llama4Model(Llama4Config.from_dict(config.to_dict())).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.normal_(0.0, 0.64 * hidden_size**-0.5, generator=generator)
    return model


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours - truth).abs().max() / truth.abs().max()).item()


def write_large(config: ReferenceConfig, directory: Path, **options: Any) -> Path:
    """A bfloat16 checkpoint by transformers' own writer, whose numbers come again and again: quickly made."""
    with torch.device("meta"):
        model = ReferenceModel(config)
    model.to_empty(device="cpu").bfloat16()
    some = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    for parameter in model.parameters():
        parameter.data.copy_(some.repeat(parameter.numel() // len(some) + 1)[: parameter.numel()].view_as(parameter))
    model.save_pretrained(directory, **options)
    return directory
