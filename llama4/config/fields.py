"""What becomes of each field of a configuration file: it is used, it is known to change nothing, or it is refused.

`FieldTable` says so for one kind of file; the tables of config.json stand here, those of other files beside what reads
them. tests/config/test_fields.py holds them against transformers' classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama4.config.rope import RopeScaling
from llama4.config.text import TextConfig
from llama4.errors import ConfigError


@dataclass(frozen=True)
class FieldTable:
    """The fields of a file, or of an object in it.

    Attributes:
        place: the file, and the object in it, for messages.
        used: fields that are read.
        without_effect: fields that change nothing -> why.
        fixed: fields that can have one value only, as far as this library computes -> the values that say so. null
            does, too.
    """

    place: str
    used: Collection[str]
    without_effect: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.used or name in self.without_effect or name in self.fixed

    def check(self, content: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: a field that asks for what this library does not compute.
        """
        for name, values in self.fixed.items():
            value = content.get(name)
            if value is not None and not any(value == each and type(value) is type(each) for each in values):
                known = " or ".join(map(repr, values)) or "null"
                raise ConfigError(
                    f"{self.place} has {name} = {value!r:.200}, which this library does not compute; it computes "
                    f"{known}: correct the field if it is wrong, or run this model in transformers"
                )

    def unknown(self, content: Mapping[str, Any]) -> list[str]:
        """Fields that are not here, and are ignored, as in transformers; names of its own begin with `_`."""
        return [name for name in content if name not in self and not name.startswith("_")]


def names_of(cls: type) -> list[str]:
    """The fields of a dataclass."""
    return [each.name for each in dataclasses.fields(cls)]


METADATA = {
    **dict.fromkeys(("architectures", "transformers_version", "auto_map"), "names of classes; no code is run"),
    **dict.fromkeys(("name_or_path", "hub_origin", "for_llm_compressor"), "where it comes from"),
    **dict.fromkeys(("return_dict", "output_hidden_states", "output_attentions"), "of the output"),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), "of classifiers"),
    **dict.fromkeys(("is_encoder_decoder", "chunk_size_feed_forward", "tie_last_hidden_states"), "of other models"),
    **dict.fromkeys(("attn_implementation", "experts_implementation"), "of speed"),
    **dict.fromkeys(("use_cache", "torchscript"), "of speed"),
    **dict.fromkeys(("initializer_range", "attention_dropout"), "of training"),
}
"""Fields of every configuration."""

CONFIG = FieldTable(
    "config.json",
    used=(
        *("model_type", "text_config", "vision_config", "dtype", "torch_dtype"),
        *("quantization_config", "quantization"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("boi_token_index", "eoi_token_index", "image_token_index"),
        *("boi_token_id", "eoi_token_id", "image_token_id"),
    ),
    without_effect={
        **METADATA,
        "tie_word_embeddings": "the one of text_config counts",
        **dict.fromkeys(("rope_scaling", "rope_theta"), "those of text_config and vision_config count"),
    },
    fixed={"per_layer_config": ({},)},
)
"""Of a model with pictures; that of the decoder alone is `TEXT`."""

TEXT = FieldTable(
    "config.json (text_config)",
    used=(
        *(
            name
            for name in names_of(TextConfig)
            if name not in ("rope_scaling", "rope_theta", "mlp_bias", "extra_embeddings", "sliding_window")
        ),
        *("rope_parameters", "rope_scaling", "rope_theta"),
        *("dtype", "torch_dtype", "quantization_config", "quantization"),
    ),
    without_effect={
        **METADATA,
        "model_type": "config.json's counts",
        **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise", "output_router_logits"), "of training"),
    },
    fixed={"hidden_act": ("silu",), "partial_rotary_factor": (1, 1.0), "per_layer_config": ({},)},
)

ROPE = FieldTable(
    "config.json (rope_parameters)",
    used=(*names_of(RopeScaling), "type", "rope_theta"),
    without_effect={
        "mrope_section": "of models whose positions have more than one axis",
    },
    fixed={"partial_rotary_factor": (1, 1.0), "chunked_attention": (), "full_attention": ()},
)

VISION = FieldTable(
    "config.json (vision_config)",
    used=(
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vision_output_dim"),
        *("projector_input_dim", "projector_output_dim", "image_size", "patch_size", "num_channels"),
        *("pixel_shuffle_ratio", "rope_parameters", "rope_scaling", "rope_theta"),
    ),
    without_effect={
        **METADATA,
        "model_type": "config.json's counts",
        **dict.fromkeys(("dtype", "torch_dtype"), "the model's counts"),
        "hidden_act": "the tower's is the exact GELU",
        "norm_eps": "the tower's is 1e-5",
        "projector_dropout": "of training",
        "multi_modal_projector_bias": "the projection has none",
        **dict.fromkeys(
            ("vision_feature_layer", "vision_feature_select_strategy"), "the last layer's patches are taken"
        ),
    },
    fixed={"per_layer_config": ({},)},
)
