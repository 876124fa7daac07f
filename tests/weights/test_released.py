"""The released models' checkpoints, key by key: configurations, names and shapes are written out here from their
description, and ours, built without memory, must be exactly these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4.config import Llama4Config, guard4, maverick, scout
from llama4.model.multimodal import Llama4Model
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.load import match_names
from llama4.weights.meta.params import config_from_params, params_from_config

D, F, DENSE, V, W = 5120, 8192, 16384, 202048, 1408
Shapes = dict[str, tuple[int, ...]]
RELEASED = pytest.mark.parametrize(
    ("preset", "experts", "step"), [(scout(), 16, 1), (maverick(), 128, 2)], ids=["scout", "maverick"]
)


def hugging_face(experts: int, step: int) -> Shapes:
    keys: Shapes = {
        "language_model.model.embed_tokens.weight": (V, D),
        "language_model.lm_head.weight": (V, D),
        "language_model.model.norm.weight": (D,),
        "vision_model.class_embedding": (W,),
        "vision_model.positional_embedding_vlm": (577, W),
        "vision_model.patch_embedding.linear.weight": (W, 588),
        "vision_model.vision_adapter.mlp.fc1.weight": (4096, 5632),
        "vision_model.vision_adapter.mlp.fc2.weight": (4096, 4096),
        "multi_modal_projector.linear_1.weight": (D, 4096),
    }
    for i in range(48):
        layer = f"language_model.model.layers.{i}"
        keys |= {f"{layer}.self_attn.{x}_proj.weight": (1024, D) for x in "kv"}
        keys |= {f"{layer}.self_attn.{x}_proj.weight": (5120, D) for x in "qo"}
        keys |= {f"{layer}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        ffn = f"{layer}.feed_forward"
        if (i + 1) % step == 0:
            keys[f"{ffn}.router.weight"] = (experts, D)
            keys[f"{ffn}.experts.gate_up_proj"] = (experts, D, 2 * F)
            keys[f"{ffn}.experts.down_proj"] = (experts, F, D)
            keys |= {f"{ffn}.shared_expert.{x}_proj.weight": (F, D) for x in ("gate", "up")}
            keys[f"{ffn}.shared_expert.down_proj.weight"] = (D, F)
        else:
            keys |= {f"{ffn}.{x}_proj.weight": (DENSE, D) for x in ("gate", "up")}
            keys[f"{ffn}.down_proj.weight"] = (D, DENSE)
    for kind in ("weight", "bias"):
        keys |= {f"vision_model.layernorm_{at}.{kind}": (W,) for at in ("pre", "post")}
    for i in range(34):
        layer = f"vision_model.model.layers.{i}"
        keys |= {f"{layer}.self_attn.{x}_proj.weight": (W, W) for x in "qkvo"}
        keys |= {f"{layer}.self_attn.{x}_proj.bias": (W,) for x in "qkvo"}
        keys |= {f"{layer}.mlp.fc1.weight": (5632, W), f"{layer}.mlp.fc1.bias": (5632,)}
        keys |= {f"{layer}.mlp.fc2.weight": (W, 5632), f"{layer}.mlp.fc2.bias": (W,)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            keys |= {f"{layer}.{norm}.{kind}": (W,) for kind in ("weight", "bias")}
    return keys


def meta(experts: int, step: int) -> Shapes:
    """What each of eight ranks holds."""
    keys: Shapes = {
        "tok_embeddings.weight": (V // 8, D),
        "norm.weight": (D,),
        "output.weight": (V // 8, D),
        "vision_projection.weight": (D // 8, 4096),
        "vision_embeddings.vision_adapter.mlp.c_fc.weight": (4096 // 8, 5632),
        "vision_embeddings.vision_adapter.mlp.c_proj.weight": (4096, 4096 // 8),
    }
    for i in range(48):
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        keys[f"{attention}.wqkv.weight"] = ((5120 + 1024 + 1024) // 8, D)
        keys[f"{attention}.wqkv.layer_norm_weight"] = (D,)
        keys[f"{attention}.wo.weight"] = (D, 5120 // 8)
        if (i + 1) % step == 0:
            keys[f"{ffn}.norm.weight"] = (D,)
            keys[f"{ffn}.router_DE"] = (D, experts)
            keys |= {f"{ffn}.experts.{x}": (experts * D, F // 8) for x in ("moe_w_in_eD_F", "moe_w_swiglu_eD_F")}
            keys[f"{ffn}.experts.moe_w_out_eF_D"] = (experts * F // 8, D)
            keys |= {f"{ffn}.{x}.weight": (F // 8, D) for x in ("w_in_shared_FD", "w_swiglu_FD")}
            keys[f"{ffn}.w_out_shared_DF.weight"] = (D, F // 8)
        else:
            keys[f"{ffn}.mlp.layer_norm_weight"] = (D,)
            keys[f"{ffn}.mlp.fc1_weight"] = (2 * DENSE // 8, D)
            keys[f"{ffn}.mlp.fc2_weight"] = (D, DENSE // 8)
    encoder = "vision_embeddings.vision_encoder"
    keys[f"{encoder}.class_embedding"] = (W,)
    keys[f"{encoder}.positional_embedding_vlm"] = (577, W)
    keys[f"{encoder}.conv1._linear.weight"] = (W // 8, 588)
    keys |= {f"{encoder}.ln_{at}.{kind}": (W,) for at in ("pre", "post") for kind in ("weight", "bias")}
    for i in range(34):
        block = f"{encoder}.transformer.resblocks.{i}"
        keys |= {f"{block}.ln_{at}.{kind}": (W,) for at in (1, 2) for kind in ("weight", "bias")}
        keys |= {f"{block}.attn.w{x}.weight": (W // 8, W) for x in "qkv"}
        keys |= {f"{block}.attn.w{x}.bias": (W // 8,) for x in "qkv"}
        keys |= {f"{block}.attn.wo.weight": (W, W // 8), f"{block}.attn.wo.bias": (W,)}
        keys |= {f"{block}.mlp.c_fc.weight": (5632 // 8, W), f"{block}.mlp.c_fc.bias": (5632 // 8,)}
        keys |= {f"{block}.mlp.c_proj.weight": (W, 5632 // 8), f"{block}.mlp.c_proj.bias": (W,)}
    return keys


def params(experts: int, step: int) -> dict[str, Any]:
    """The released `params.json`."""
    return {
        "dim": 5120,
        "n_layers": 48,
        "n_heads": 40,
        "n_kv_heads": 8,
        "vocab_size": 202048,
        "ffn_exp": 4.0,
        "ffn_dim_multiplier": 1.2,
        "multiple_of": 2048,
        "norm_eps": 1e-5,
        "attention_chunk_size": 8192,
        "rope_theta": 500000.0,
        "use_scaled_rope": experts == 16,
        "nope_layer_interval": 4,
        "use_qk_norm": experts == 16,
        "attn_temperature_tuning": True,
        "moe_args": {
            "num_experts": experts,
            "capacity_factor": 1.0,
            "auto_scale_F": True,
            "top_k": 1,
            "interleave_moe_layer_step": step,
        },
        "vision_args": {
            "image_size": {"height": 336, "width": 336},
            "patch_size": {"height": 14, "width": 14},
            "dim": 1408,
            "n_layers": 34,
            "n_heads": 16,
            "mlp_ratio": 4.0,
            "output_dim": 4096,
            "pixel_shuffle_ratio": 0.5,
        },
    }


@RELEASED
def test_hugging_faces_keys_and_shapes(preset: Llama4Config, experts: int, step: int) -> None:
    with torch.device("meta"):
        model = Llama4Model(preset)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == hugging_face(experts, step)


@RELEASED
def test_metas_keys_and_shapes(preset: Llama4Config, experts: int, step: int, tmp_path: Path) -> None:
    """Eight files of tensors without content are a whole checkpoint, for all that is asked before reading."""
    (tmp_path / "params.json").write_text(json.dumps(params(experts, step)))
    ranks = {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in meta(experts, step).items()}
    for rank in range(8):
        torch.save(ranks, tmp_path / f"consolidated.{rank:02d}.pth")
    config, source = open_checkpoint(tmp_path)
    with torch.device("meta"):
        model = Llama4Model(config)
    assert sorted(match_names(model, source)) == sorted(source.names()) == sorted(hugging_face(experts, step))
    assert config == replace(preset, dtype="bfloat16", note="")


@RELEASED
def test_params_there_and_back(preset: Llama4Config, experts: int, step: int) -> None:
    content = params(experts, step)
    for config in (config_from_params(content), config_from_params({"model": content})):
        assert (config.text, config.vision) == (preset.text, preset.vision)
    written = params_from_config(preset)
    assert {name: written[name] for name in content} == content
    assert config_from_params(written).text == preset.text


def test_guards_params_there_and_back() -> None:
    """All layers dense, with RoPE, unchunked."""
    written = params_from_config(guard4())
    assert (written.get("moe_args"), written["attention_chunk_size"], written["nope_layer_interval"]) == (None,) * 3
    again, text = config_from_params(written).text, guard4().text
    assert replace(again, intermediate_size=text.intermediate_size) == text  # no expert has that width
