"""Meta's names: where each parameter of the model is in the files of the ranks. They appear in this file alone.

A rank holds a slice of most tensors, under names and in shapes of its own. Reading and writing both follow `pieces`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llama4.config import Llama4Config
from llama4.families.names import EMBEDDING, HEAD
from llama4.quantization.weight import Shape
from llama4.text.vocabulary import LLAMA3_RANKS
from llama4.vision.tiled_config import TiledVisionConfig


@dataclass(frozen=True)
class Piece:
    """Where a parameter, or an equal part of its last dimension, is in the files.

    Attributes:
        key: Meta's name.
        join: the parameter's dimension that is divided among the ranks; None if each rank has all of it.
        share: (begin, end, count): which rows of the tensor are the parameter's, if it is cut into `count` equal runs.
        experts: E, where Meta flattens [E, a, b] to [E * a, b].
        transpose: whether Meta has the matrix transposed.
    """

    key: str
    join: int | None = None
    share: tuple[int, int, int] = (0, 1, 1)
    experts: int | None = None
    transpose: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a rank's tensor that is the parameter's, as a view."""
        if self.experts is not None:
            tensor = tensor.unflatten(0, (self.experts, -1))
        begin, end, whole = self.share
        if whole > 1:
            rows = tensor.shape[0] // whole
            tensor = tensor[begin * rows : end * rows]
        return tensor.mT if self.transpose else tensor

    def slice(self, parameter: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's slice of the parameter, in Meta's shape: the inverse of `of` and of joining."""
        if self.join is not None:
            parameter = parameter.chunk(ranks, dim=self.join)[rank]
        parameter = parameter.mT if self.transpose else parameter
        return parameter.flatten(0, 1) if self.experts is not None else parameter


def pieces(config: Llama4Config, shapes: Mapping[str, Shape] | None = None) -> dict[str, tuple[Piece, ...]]:
    """Parameter -> its pieces, concatenated along the last dimension.

    Args:
        shapes: of the tensors in a rank's file, where there is one.
    """
    return _FAMILIES[config.family](config, shapes)


def _llama_pieces(config: Llama4Config, shapes: Mapping[str, Shape] | None) -> dict[str, tuple[Piece, ...]]:
    """Of Llama 1 to 3.3. Ranks divide the embeddings by their width in Llama 1 and 2, by the vocabulary in Llama 3; a
    model whose head is the embeddings need not have it."""
    text, embeddings = config.text, "tok_embeddings.weight"
    if shapes is not None and embeddings in shapes:
        by_width = shapes[embeddings][-1] < text.hidden_size
    else:
        by_width = text.vocab_size < LLAMA3_RANKS
    head = "output.weight" if shapes is None or "output.weight" in shapes else embeddings
    table: dict[str, tuple[Piece, ...]] = {
        EMBEDDING: (Piece(embeddings, 1 if by_width else 0),),
        "language_model.model.norm.weight": (Piece("norm.weight"),),
        HEAD: (Piece(head, 1 if by_width and head == embeddings else 0),),
    }
    for i in range(text.num_hidden_layers):
        ours, theirs = f"language_model.model.layers.{i}", f"layers.{i}"
        joins = [
            *((f"self_attn.{x}_proj", f"attention.w{x}", 0) for x in "qkv"),
            ("self_attn.o_proj", "attention.wo", 1),
            ("feed_forward.gate_proj", "feed_forward.w1", 0),
            ("feed_forward.down_proj", "feed_forward.w2", 1),
            ("feed_forward.up_proj", "feed_forward.w3", 0),
            ("input_layernorm", "attention_norm", None),
            ("post_attention_layernorm", "ffn_norm", None),
        ]
        table |= {f"{ours}.{name}.weight": (Piece(f"{theirs}.{key}.weight", join),) for name, key, join in joins}
    return table


def _llama4_pieces(config: Llama4Config, shapes: Mapping[str, Shape] | None) -> dict[str, tuple[Piece, ...]]:
    text, vision = config.text, config.vision
    H, K, E = text.num_attention_heads, text.num_key_value_heads, text.num_local_experts
    table: dict[str, tuple[Piece, ...]] = {
        EMBEDDING: (Piece("tok_embeddings.weight", 0),),
        "language_model.model.norm.weight": (Piece("norm.weight"),),
        HEAD: (Piece("output.weight", 0),),
    }
    for i in range(text.num_hidden_layers):
        ours, theirs = f"language_model.model.layers.{i}", f"layers.{i}"
        attention, ffn = f"{theirs}.attention", f"{theirs}.feed_forward"
        table |= {
            f"{ours}.self_attn.q_proj.weight": (Piece(f"{attention}.wqkv.weight", 0, (0, H, H + 2 * K)),),
            f"{ours}.self_attn.k_proj.weight": (Piece(f"{attention}.wqkv.weight", 0, (H, H + K, H + 2 * K)),),
            f"{ours}.self_attn.v_proj.weight": (Piece(f"{attention}.wqkv.weight", 0, (H + K, H + 2 * K, H + 2 * K)),),
            f"{ours}.self_attn.o_proj.weight": (Piece(f"{attention}.wo.weight", 1),),
            f"{ours}.input_layernorm.weight": (Piece(f"{attention}.wqkv.layer_norm_weight"),),
        }
        if text.uses_experts(i):
            table |= {
                f"{ours}.post_attention_layernorm.weight": (Piece(f"{ffn}.norm.weight"),),
                f"{ours}.feed_forward.router.weight": (Piece(f"{ffn}.router_DE", transpose=True),),
                f"{ours}.feed_forward.experts.gate_up_proj": (
                    Piece(f"{ffn}.experts.moe_w_in_eD_F", 2, experts=E),
                    Piece(f"{ffn}.experts.moe_w_swiglu_eD_F", 2, experts=E),
                ),
                f"{ours}.feed_forward.experts.down_proj": (Piece(f"{ffn}.experts.moe_w_out_eF_D", 1, experts=E),),
                f"{ours}.feed_forward.shared_expert.gate_proj.weight": (Piece(f"{ffn}.w_in_shared_FD.weight", 0),),
                f"{ours}.feed_forward.shared_expert.up_proj.weight": (Piece(f"{ffn}.w_swiglu_FD.weight", 0),),
                f"{ours}.feed_forward.shared_expert.down_proj.weight": (Piece(f"{ffn}.w_out_shared_DF.weight", 1),),
            }
        else:
            table |= {
                f"{ours}.post_attention_layernorm.weight": (Piece(f"{ffn}.mlp.layer_norm_weight"),),
                f"{ours}.feed_forward.gate_proj.weight": (Piece(f"{ffn}.mlp.fc1_weight", 0, (0, 1, 2)),),
                f"{ours}.feed_forward.up_proj.weight": (Piece(f"{ffn}.mlp.fc1_weight", 0, (1, 2, 2)),),
                f"{ours}.feed_forward.down_proj.weight": (Piece(f"{ffn}.mlp.fc2_weight", 1),),
            }
    return table | (_vision_pieces(vision.num_hidden_layers) if vision is not None else {})


def _vision_pieces(layers: int) -> dict[str, tuple[Piece, ...]]:
    encoder = "vision_embeddings.vision_encoder"
    joins: list[tuple[str, str, int | None]] = [  # ours, Meta's, joined along
        ("vision_model.class_embedding", f"{encoder}.class_embedding", None),
        ("vision_model.positional_embedding_vlm", f"{encoder}.positional_embedding_vlm", None),
        ("vision_model.patch_embedding.linear.weight", f"{encoder}.conv1._linear.weight", 0),
        ("vision_model.vision_adapter.mlp.fc1.weight", "vision_embeddings.vision_adapter.mlp.c_fc.weight", 0),
        ("vision_model.vision_adapter.mlp.fc2.weight", "vision_embeddings.vision_adapter.mlp.c_proj.weight", 1),
        ("multi_modal_projector.linear_1.weight", "vision_projection.weight", 0),
    ]
    for kind in ("weight", "bias"):
        joins += [(f"vision_model.layernorm_{at}.{kind}", f"{encoder}.ln_{at}.{kind}", None) for at in ("pre", "post")]
        for i in range(layers):
            ours, theirs = f"vision_model.model.layers.{i}", f"{encoder}.transformer.resblocks.{i}"
            joins += [
                (f"{ours}.input_layernorm.{kind}", f"{theirs}.ln_1.{kind}", None),
                (f"{ours}.post_attention_layernorm.{kind}", f"{theirs}.ln_2.{kind}", None),
                *((f"{ours}.self_attn.{x}_proj.{kind}", f"{theirs}.attn.w{x}.{kind}", 0) for x in "qkv"),
                (f"{ours}.self_attn.o_proj.{kind}", f"{theirs}.attn.wo.{kind}", 1 if kind == "weight" else None),
                (f"{ours}.mlp.fc1.{kind}", f"{theirs}.mlp.c_fc.{kind}", 0),
                (f"{ours}.mlp.fc2.{kind}", f"{theirs}.mlp.c_proj.{kind}", 1 if kind == "weight" else None),
            ]
    return {ours: (Piece(theirs, join),) for ours, theirs, join in joins}


OF_TEXT = f"{EMBEDDING}/text"
LEARNABLE = f"{EMBEDDING}/images"
UNFOLDED = "vision_model.patch_embedding.weight/unfolded"
OF_GRIDS = (
    "vision_model.gated_positional_embedding.tile_embedding.weight/grids",
    "vision_model.pre_tile_positional_embedding.embedding.weight/grids",
    "vision_model.post_tile_positional_embedding.embedding.weight/grids",
)
"""Parts of Llama 3.2 Vision's parameters, or these in Meta's shape: see mllama.py."""


def _mllama_pieces(config: Llama4Config, shapes: Mapping[str, Shape] | None) -> dict[str, tuple[Piece, ...]]:
    vision, encoder = config.vision, "vision_model.vision_encoder"
    assert isinstance(vision, TiledVisionConfig)
    joins: list[tuple[str, str, int | None]] = [  # ours, Meta's, joined along
        (OF_TEXT, "text_model.tok_embeddings.weight", 0),
        (LEARNABLE, "text_model.learnable_embedding.weight", 0),
        ("language_model.model.norm.weight", "text_model.norm.weight", None),
        (HEAD, "text_model.output.weight", 0),
        *((f"multi_modal_projector.{kind}", f"vision_model.vision_projection.{kind}", 0) for kind in _KINDS),
        (UNFOLDED, f"{encoder}.conv1._linear.weight", 0),
        (OF_GRIDS[0], f"{encoder}.gated_positional_embedding", None),
        (OF_GRIDS[1], f"{encoder}.pre_tile_pos_embed.embedding", None),
        (OF_GRIDS[2], f"{encoder}.post_tile_pos_embed.embedding", None),
        ("vision_model.class_embedding", f"{encoder}.class_embedding", None),
        ("vision_model.gated_positional_embedding.embedding", f"{encoder}.positional_embedding", None),
        ("vision_model.gated_positional_embedding.gate", f"{encoder}.gated_positional_embedding_gate", None),
    ]
    for at in ("pre", "post"):
        joins.append((f"vision_model.{at}_tile_positional_embedding.gate", f"{encoder}.{at}_tile_pos_embed.gate", None))
        joins += [(f"vision_model.layernorm_{at}.{kind}", f"{encoder}.ln_{at}.{kind}", None) for kind in _KINDS]
    for stack, count in (("transformer", vision.num_hidden_layers), ("global_transformer", vision.num_global_layers)):
        for i in range(count):
            ours, theirs = f"vision_model.{stack}.layers.{i}", f"{encoder}.{stack}.resblocks.{i}"
            joins += [(f"{ours}.self_attn.{x}_proj.weight", f"{theirs}.attn.w{x}.weight", 0) for x in "qkv"]
            joins.append((f"{ours}.self_attn.o_proj.weight", f"{theirs}.attn.wo.weight", 1))
            for kind in _KINDS:
                joins += [
                    (f"{ours}.input_layernorm.{kind}", f"{theirs}.ln_1.{kind}", None),
                    (f"{ours}.post_attention_layernorm.{kind}", f"{theirs}.ln_2.{kind}", None),
                    (f"{ours}.mlp.fc1.{kind}", f"{theirs}.mlp.c_fc.{kind}", 0),
                    (f"{ours}.mlp.fc2.{kind}", f"{theirs}.mlp.c_proj.{kind}", 1 if kind == "weight" else None),
                ]
            if stack == "global_transformer":
                joins += [(f"{ours}.{gate}", f"{theirs}.{gate}", None) for gate in ("gate_attn", "gate_ffn")]
    for i in range(config.text.num_hidden_layers):
        ours = f"language_model.model.layers.{i}"
        if config.text.is_cross(i):
            theirs, attention = f"text_model.cross_attention_layers.{config.text.cross_layers.index(i)}", "cross_attn"
            joins += [(f"{ours}.cross_attn.{x}_norm.weight", f"{theirs}.attention.{x}_norm.weight", None) for x in "qk"]
            joins.append((f"{ours}.cross_attn_attn_gate", f"{theirs}.gate_attn", None))
            joins.append((f"{ours}.cross_attn_mlp_gate", f"{theirs}.gate_ffwd", None))
        else:
            theirs, attention = f"text_model.layers.{config.text.self_layers.index(i)}", "self_attn"
        joins += [(f"{ours}.{attention}.{x}_proj.weight", f"{theirs}.attention.w{x}.weight", 0) for x in "qkv"]
        joins += [
            (f"{ours}.{attention}.o_proj.weight", f"{theirs}.attention.wo.weight", 1),
            (f"{ours}.feed_forward.gate_proj.weight", f"{theirs}.feed_forward.w1.weight", 0),
            (f"{ours}.feed_forward.down_proj.weight", f"{theirs}.feed_forward.w2.weight", 1),
            (f"{ours}.feed_forward.up_proj.weight", f"{theirs}.feed_forward.w3.weight", 0),
            (f"{ours}.input_layernorm.weight", f"{theirs}.attention_norm.weight", None),
            (f"{ours}.post_attention_layernorm.weight", f"{theirs}.ffn_norm.weight", None),
        ]
    return {ours: (Piece(theirs, join),) for ours, theirs, join in joins}


_KINDS = ("weight", "bias")
_FAMILIES: dict[str, Callable[[Llama4Config, Mapping[str, Shape] | None], dict[str, tuple[Piece, ...]]]] = {
    "llama4": _llama4_pieces,
    "llama": _llama_pieces,
    "mistral": _llama_pieces,
    "mllama": _mllama_pieces,
}
"""By `Llama4Config.family`."""
