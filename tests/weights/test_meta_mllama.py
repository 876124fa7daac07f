"""Meta's layout of Llama 3.2 Vision: ranks cut from transformers' model as Meta's parallel layers cut them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4.api import Llama4
from llama4.errors import ConfigError
from llama4.families import FAMILIES, PRESETS
from llama4.weights.meta import mllama
from tests.families import mllama_models as made
from tests.families.mllama_models import IMAGE
from tests.parity.references import relative_error
from tests.weights.test_meta_llama import in_pairs

PARAMS = {
    **{"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024},
    **{"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
    **{"vision_chunk_size": 560, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 8},
}
"""Of Llama 3.2 11B Vision."""
LARGE = {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "vision_num_cross_attention_layers": 20}
RENAMES = (  # transformers' names -> those of models/llama3/multimodal/model.py, and what is cut for the ranks
    (r"lm_head\.weight", r"text_model.output.weight", 0),
    (r"model\.language_model\.norm\.weight", r"text_model.norm.weight", None),
    (r"LAYER\.(?:self|cross)_attn\.([qkv])_proj\.weight", r"attention.w\1.weight", 0),
    (r"LAYER\.(?:self|cross)_attn\.o_proj\.weight", r"attention.wo.weight", 1),
    (r"LAYER\.cross_attn\.([qk])_norm\.weight", r"attention.\1_norm.weight", None),
    (r"LAYER\.mlp\.gate_proj\.weight", r"feed_forward.w1.weight", 0),
    (r"LAYER\.mlp\.down_proj\.weight", r"feed_forward.w2.weight", 1),
    (r"LAYER\.mlp\.up_proj\.weight", r"feed_forward.w3.weight", 0),
    (r"LAYER\.input_layernorm\.weight", r"attention_norm.weight", None),
    (r"LAYER\.post_attention_layernorm\.weight", r"ffn_norm.weight", None),
    (r"LAYER\.cross_attn_attn_gate", r"gate_attn", None),
    (r"LAYER\.cross_attn_mlp_gate", r"gate_ffwd", None),
    (r"model\.multi_modal_projector\.(weight|bias)", r"vision_model.vision_projection.\1", 0),
    (r"TOWER\.class_embedding", r"ENCODER.class_embedding", None),
    (r"TOWER\.layernorm_(pre|post)\.(weight|bias)", r"ENCODER.ln_\1.\2", None),
    (r"TOWER\.(pre|post)_tile_positional_embedding\.gate", r"ENCODER.\1_tile_pos_embed.gate", None),
    (r"TOWER\.gated_positional_embedding\.gate", r"ENCODER.gated_positional_embedding_gate", None),
    (r"TOWER\.gated_positional_embedding\.embedding", r"ENCODER.positional_embedding", None),
    (r"BLOCK\.self_attn\.([qkv])_proj\.weight", r"ENCODER.\1.resblocks.\2.attn.w\3.weight", 0),
    (r"BLOCK\.self_attn\.o_proj\.weight", r"ENCODER.\1.resblocks.\2.attn.wo.weight", 1),
    (r"BLOCK\.mlp\.fc1\.(weight|bias)", r"ENCODER.\1.resblocks.\2.mlp.c_fc.\3", 0),
    (r"BLOCK\.mlp\.fc2\.weight", r"ENCODER.\1.resblocks.\2.mlp.c_proj.weight", 1),
    (r"BLOCK\.mlp\.fc2\.bias", r"ENCODER.\1.resblocks.\2.mlp.c_proj.bias", None),
    (r"BLOCK\.input_layernorm\.(weight|bias)", r"ENCODER.\1.resblocks.\2.ln_1.\3", None),
    (r"BLOCK\.post_attention_layernorm\.(weight|bias)", r"ENCODER.\1.resblocks.\2.ln_2.\3", None),
    (r"BLOCK\.(gate_attn|gate_ffn)", r"ENCODER.\1.resblocks.\2.\3", None),
)
LAYERS = {0: "cross_attention_layers.0", 1: "layers.0", 2: "layers.1", 3: "cross_attention_layers.1", 4: "layers.2"}


def meta_tensors(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, int | None]]:
    """Meta's name -> tensor, and the dimension that is cut."""
    tensors: dict[str, tuple[Tensor, int | None]] = {}
    rest = dict(state)
    for name, tensor in state.items():
        for pattern, new, join in RENAMES:
            pattern = pattern.replace("LAYER", r"model\.language_model\.layers\.\d+").replace(
                "BLOCK", r"model\.vision_model\.(transformer|global_transformer)\.layers\.(\d+)"
            )
            match = re.fullmatch(pattern.replace("TOWER", r"model\.vision_model"), name)
            if match is None:
                continue
            key = match.expand(new.replace("ENCODER", "vision_model.vision_encoder"))
            if ".language_model.layers." in name:
                key = f"text_model.{LAYERS[int(name.split('.')[3])]}.{key}"
            turned = re.search(r"\.self_attn\.[qk]_proj", name) and ".language_model." in name
            tensors[key] = in_pairs(tensor, 32) if turned else tensor, join
            del rest[name]
    embeddings = rest.pop("model.language_model.embed_tokens.weight")
    tensors["text_model.tok_embeddings.weight"] = embeddings[:IMAGE], 0
    tensors["text_model.learnable_embedding.weight"] = embeddings[IMAGE:], 0
    conv = rest.pop("model.vision_model.patch_embedding.weight")
    tensors["vision_model.vision_encoder.conv1._linear.weight"] = conv.flatten(1), 0
    for ours, key in (
        ("gated_positional_embedding.tile_embedding", "gated_positional_embedding"),
        ("pre_tile_positional_embedding.embedding", "pre_tile_pos_embed.embedding"),
        ("post_tile_positional_embedding.embedding", "post_tile_pos_embed.embedding"),
    ):
        rows = rest.pop(f"model.vision_model.{ours}.weight").view(9, 4, -1, 32)
        grids = torch.zeros(4, 4, *rows.shape[2:])
        for grid, row in zip(made.ARRANGEMENTS, rows[1:], strict=True):
            grids[: grid[0], : grid[1]] = row[: grid[0] * grid[1]].view(*grid, *row.shape[1:])
        tensors[f"vision_model.vision_encoder.{key}"] = grids, None
    assert not rest
    return tensors


def consistent(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With embeddings that Meta's shape can hold: those of a tile's row and column are the same in all grids, and there
    are none of tiles that a grid does not have."""
    for name, table in state.items():
        if "tile" in name and table.ndim == 2:
            source = table.view(9, 4, -1)[8].clone()  # any
            by_place = {(r, c): source[(r + c) % 4] * (1 + r) / (1 + c) for r in range(4) for c in range(4)}
            table.zero_()
            for row, (rows, cols) in zip(table.view(9, 4, -1)[1:], made.ARRANGEMENTS, strict=True):
                for i in range(rows * cols):
                    row[i] = by_place[i // cols, i % cols]
    return state


@pytest.mark.parametrize("ranks", [1, 2])
@torch.inference_mode()
def test_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    model = made.fresh(cross_attention_layers=[0, 3])
    model.load_state_dict(consistent({name: tensor.clone() for name, tensor in model.state_dict().items()}))
    for rank in range(ranks):
        state = {
            key: (tensor if join is None else tensor.chunk(ranks, join)[rank]).clone()
            for key, (tensor, join) in meta_tensors(model.state_dict()).items()
        }
        torch.save(state, tmp_path / f"consolidated.{rank:02d}.pth")
    params = PARAMS | {
        "dim": 128,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": IMAGE,
        "multiple_of": 128,
    }
    params |= {"ffn_dim_multiplier": 0.3, "vision_chunk_size": 28, "vision_num_cross_attention_layers": 2}
    (tmp_path / "params.json").write_text(json.dumps(params | {"use_scaled_rope": False}))
    monkeypatch.setattr(mllama, "TOWER", FAMILIES["mllama"].read_config(made.write(tmp_path / "hf")).vision)
    llm = Llama4.from_pretrained(tmp_path, progress=False)
    assert llm.config.text.cross_layers == (0, 3)
    ids = torch.randint(0, 800, (1, 20), generator=torch.Generator().manual_seed(1))
    ids[0, 3] = IMAGE
    pixels, grids = made.pictures(((1, 3),))
    got = llm.model(ids, pixel_values=pixels, image_grids=grids)
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    plain = made.fresh(cross_attention_layers=[0, 3], rope_parameters=rope)
    plain.load_state_dict(model.state_dict())
    assert relative_error(got, made.theirs(ids, pixels, grids, model=plain)) < 1e-5


@pytest.mark.parametrize(("name", "changes"), [("llama-3.2-11b-vision", {}), ("llama-3.2-90b-vision", LARGE)])
def test_configurations_of_released_models(name: str, changes: dict[str, int]) -> None:
    """But for which tokens end a reply: Meta's files are the same for base and instructed models."""
    config, preset = mllama.config_from_params(PARAMS | changes), PRESETS[name]()
    assert dataclasses.replace(config.text, eos_token_id=preset.text.eos_token_id) == preset.text
    assert (config.vision, config.image_token_index) == (preset.vision, preset.image_token_index)


def test_layers_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be from 1 to n_layers, 32"):
        mllama.config_from_params(PARAMS | {"vision_num_cross_attention_layers": 33})
