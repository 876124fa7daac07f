"""The released models' checkpoints, key by key: names and shapes are written out here from their description, and our
models, built without memory, must ask for exactly these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llama4.config import Llama4Config, maverick, scout
from llama4.model import Llama4Model
from llama4.weights.meta import pieces

D, F, DENSE, V, W = 5120, 8192, 16384, 202048, 1408
Shapes = dict[str, tuple[int, ...]]


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


def meta(step: int) -> set[str]:
    keys = {"tok_embeddings.weight", "norm.weight", "output.weight", "vision_projection.weight"}
    for i in range(48):
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        keys |= {f"{attention}.wqkv.weight", f"{attention}.wqkv.layer_norm_weight", f"{attention}.wo.weight"}
        if (i + 1) % step == 0:
            keys |= {f"{ffn}.{x}" for x in ("norm.weight", "router_DE")}
            keys |= {f"{ffn}.experts.{x}" for x in ("moe_w_in_eD_F", "moe_w_swiglu_eD_F", "moe_w_out_eF_D")}
            keys |= {f"{ffn}.{x}.weight" for x in ("w_in_shared_FD", "w_swiglu_FD", "w_out_shared_DF")}
        else:
            keys |= {f"{ffn}.mlp.{x}_weight" for x in ("fc1", "fc2", "layer_norm")}
    encoder = "vision_embeddings.vision_encoder"
    keys |= {f"{encoder}.{x}" for x in ("class_embedding", "positional_embedding_vlm", "conv1._linear.weight")}
    keys |= {f"{encoder}.ln_{at}.{kind}" for at in ("pre", "post") for kind in ("weight", "bias")}
    keys |= {f"vision_embeddings.vision_adapter.mlp.{x}.weight" for x in ("c_fc", "c_proj")}
    for i in range(34):
        for part in ("ln_1", "ln_2", "attn.wq", "attn.wk", "attn.wv", "attn.wo", "mlp.c_fc", "mlp.c_proj"):
            keys |= {f"{encoder}.transformer.resblocks.{i}.{part}.{kind}" for kind in ("weight", "bias")}
    return keys


@pytest.mark.parametrize(("preset", "experts", "step"), [(scout, 16, 1), (maverick, 128, 2)], ids=["scout", "maverick"])
def test_every_key_and_shape(preset: Callable[[], Llama4Config], experts: int, step: int) -> None:
    with torch.device("meta"):
        model = Llama4Model(preset())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == hugging_face(experts, step)
    parts = pieces(preset())
    assert set(parts) == set(hugging_face(experts, step))
    assert {piece.key for its_pieces in parts.values() for piece in its_pieces} == meta(step)
