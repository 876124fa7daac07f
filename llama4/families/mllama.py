"""Llama 3.2 Vision (`MllamaForConditionalGeneration`): Llama 3.1's decoder with layers of cross-attention between."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama4.config import CONFIG_FILE, Llama4Config, TextConfig
from llama4.config.fields import METADATA, ROPE, FieldTable
from llama4.config.hf_json import TOKEN_IDS
from llama4.config.rope import longer_window, read_scaling, read_theta, rope_section, write_rope
from llama4.config.typed import read_fields, read_value, section
from llama4.errors import ConfigError
from llama4.families import mllama_images
from llama4.families.base import Family
from llama4.families.fusion import SeenByCrossAttention
from llama4.families.mllama_presets import PRESETS, layer_kinds
from llama4.families.names import HalvesToPairs, NameTable
from llama4.model.cross_model import CrossAttentionModel
from llama4.model.experts import Experts, LoopExperts
from llama4.reading import read_json
from llama4.text.chat_formats import CHAT_FORMATS
from llama4.text.template_agreement import Compose
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import LLAMA32_VISION
from llama4.vision.tiled_config import TiledVisionConfig, grids

EXTRA_EMBEDDINGS = 8
"""Rows of the embeddings behind the vocabulary, the first of which is `<|image|>`'s."""

CONFIG = FieldTable(
    CONFIG_FILE,
    used=(
        *("model_type", "text_config", "vision_config", "image_token_index", "image_token_id"),
        *("dtype", "torch_dtype", "quantization_config", "quantization", *TOKEN_IDS, "transformers_version"),
    ),
    without_effect={
        **{name: why for name, why in METADATA.items() if name != "transformers_version"},
        "tie_word_embeddings": "the one of text_config counts",
        **dict.fromkeys(("rope_scaling", "rope_theta"), "those of text_config count"),
    },
    fixed={"per_layer_config": ({},)},
)
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SAME = (*_SIZES, "max_position_embeddings", "rms_norm_eps")
"""Fields that have one name in text_config and in `TextConfig`."""

TEXT = FieldTable(
    f"{CONFIG_FILE} (text_config)",
    used=(
        *(*_SAME, *TOKEN_IDS, "intermediate_size", "cross_attention_layers"),
        *("rope_parameters", "rope_scaling", "rope_theta", "head_dim", "dtype", "torch_dtype"),
    ),
    without_effect={**METADATA, "model_type": "config.json's counts", "dropout": "of training"},
    fixed={
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
        "partial_rotary_factor": (1, 1.0),
        "per_layer_config": ({},),
    },
)
_VISION = ("hidden_size", "num_hidden_layers", "num_global_layers", "intermediate_size", "vision_output_dim")
_VISION_SAME = (*_VISION, "image_size", "patch_size", "num_channels", "norm_eps")

VISION = FieldTable(
    f"{CONFIG_FILE} (vision_config)",
    used=(
        *(*_VISION_SAME, "attention_heads", "num_attention_heads", "max_num_tiles"),
        *("intermediate_layers_indices", "supported_aspect_ratios"),
    ),
    without_effect={
        **METADATA,
        "model_type": "config.json's counts",
        **dict.fromkeys(("dtype", "torch_dtype"), "the model's counts"),
        "max_aspect_ratio_id": "it follows from supported_aspect_ratios",
        **dict.fromkeys(("rope_scaling", "rope_theta"), "the tower has learned positions"),
    },
    fixed={"hidden_act": ("gelu",), "per_layer_config": ({},)},
)

_TEXT_DEFAULTS: Mapping[str, Any] = {
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    **{"cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]},
    **{"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
}
_VISION_DEFAULTS: Mapping[str, Any] = {"image_size": 448, "max_num_tiles": 4, "vision_output_dim": 7680}
_INTERMEDIATE = [3, 7, 15, 23, 30]
"""What files mean that are silent on a field (transformers' MllamaConfig)."""

_NEW = "model.language_model."
"""How names of the decoder begin since transformers 4.52; what is published has others."""
_DECODER = r"language_model\.model\.layers\.\d+\."


class MllamaFamily(Family):
    """A tower that sees all tiles of a picture at once, and a decoder some layers of which attend to it."""

    name = "mllama"
    title = "Llama 3.2 Vision"
    model_types = ("mllama",)
    presets = PRESETS
    vocabulary = LLAMA32_VISION
    fusion = SeenByCrossAttention()
    image_tables = (mllama_images.PROCESSOR, mllama_images.IMAGE)

    def described(self, content: Mapping[str, Any]) -> Iterator[tuple[FieldTable, Mapping[str, Any]]]:
        text = content.get("text_config") or {}
        yield CONFIG, content
        yield TEXT, text
        for name in ("rope_parameters", "rope_scaling"):
            yield ROPE, text.get(name) or {}
        yield VISION, content.get("vision_config") or {}

    def read_config(self, directory: Path) -> Llama4Config:
        config = read_config(read_json(directory / CONFIG_FILE))
        assert config.vision is not None
        vision = dataclasses.replace(config.vision, **mllama_images.read(directory, config.vision))
        return dataclasses.replace(config, vision=vision)

    def write_config(self, config: Llama4Config) -> dict[str, Any]:
        return write_config(config)

    def image_files(self, config: Llama4Config) -> tuple[dict[str, Any], dict[str, Any]]:
        assert config.vision is not None
        image, processor = mllama_images.write(config.vision)
        return image, dict(processor)

    def chat_format(self, config: Llama4Config, tokenizer: Tokenizer) -> Compose | None:
        """Llama 3's, if its turns end replies: base models have the same tokens, and end with another."""
        end = tokenizer.special_tokens.get(LLAMA32_VISION.eos)
        return CHAT_FORMATS["llama3"] if end is not None and end in config.text.eos_token_id else None

    def names(self, config: Llama4Config, keys: Collection[str] | None = None) -> NameTable:
        layers = "language_model.model.layers.*"
        published = ((f"{layers}.mlp", f"{layers}.feed_forward"), ("*", "*"))
        of_transformers_5 = (
            ("model.language_model.layers.*.mlp", f"{layers}.feed_forward"),
            ("model.language_model", "language_model.model"),
            ("lm_head", "language_model.lm_head"),
            ("model.vision_model", "vision_model"),
            ("model.multi_modal_projector", "multi_modal_projector"),
        )
        is_new = keys is not None and any(key.startswith(_NEW) for key in keys)
        return NameTable(
            of_transformers_5 if is_new else published,
            ((_DECODER + r"self_attn\.[qk]_proj", HalvesToPairs(config.text.head_dim)),),
            modules={
                "language_model.lm_head": "lm_head",
                "multi_modal_projector": "model.multi_modal_projector",
            },
        )

    def module_names(self, config: Llama4Config) -> NameTable:
        return self.names(config, (_NEW,))

    def build(self, config: Llama4Config, experts: type[Experts] | None = None) -> CrossAttentionModel:
        return CrossAttentionModel(config, experts or LoopExperts)


def read_config(content: Mapping[str, Any]) -> Llama4Config:
    """From the content of config.json.

    Raises:
        ConfigError: a value that cannot be, or that asks for what this library does not compute.
    """
    CONFIG.check(content)
    text = section(content, "text_config", CONFIG_FILE)
    text = {**text, **{name: content[name] for name in TOKEN_IDS if content.get(name) is not None}}
    dtypes = (part.get(name) for part in (content, text) for name in ("dtype", "torch_dtype"))
    quantization = (section(content, name, CONFIG_FILE) for name in ("quantization_config", "quantization"))
    decoder = _checked(TEXT.place, lambda: _read_text(text))
    tower = section(content, "vision_config", CONFIG_FILE)
    image = content.get("image_token_id", content.get("image_token_index", 128256))
    return Llama4Config(
        decoder,
        _checked(VISION.place, lambda: _read_vision(tower, _counts_inputs(content))),
        boi_token_index=-1,
        eoi_token_index=-1,
        image_token_index=read_value(int, image, "image_token_index", CONFIG_FILE),
        dtype=read_value(str, next(filter(None, dtypes), "float32"), "dtype", CONFIG_FILE),
        quantization_config=next(filter(None, quantization), None),
        family=MllamaFamily.name,
    )


def _checked(place: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ConfigError as error:
        raise error if str(error).startswith(CONFIG_FILE) else ConfigError(f"{place}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _read_text(content: Mapping[str, Any]) -> TextConfig:
    TEXT.check(content)
    given = {**_TEXT_DEFAULTS, **{name: value for name, value in content.items() if value is not None}}
    eos, place = content.get("eos_token_id", _TEXT_DEFAULTS["eos_token_id"]), TEXT.place
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    fields = read_fields(TextConfig, {name: given[name] for name in _SAME}, place)
    fields |= read_fields(TextConfig, {"eos_token_id": ids}, place)
    for name in ("bos_token_id", "pad_token_id"):
        fields[name] = read_value(int | None, content.get(name, _TEXT_DEFAULTS[name]), name, place)
    rope, window = rope_section(content, place), fields["max_position_embeddings"]
    ROPE.check(rope)
    scaling = read_scaling(rope, window, ROPE.place)
    width = fields["hidden_size"] // max(fields["num_attention_heads"], 1)
    if (head_dim := read_value(int | None, content.get("head_dim"), "head_dim", place)) not in (None, width):
        raise ConfigError(
            f"{place} has head_dim = {head_dim}, but hidden_size over num_attention_heads is {width}, which "
            "transformers computes with; leave it out"
        )
    cross = read_value(tuple[int, ...], given["cross_attention_layers"], "cross_attention_layers", place)
    if outside := [i for i in cross if not 0 <= i < fields["num_hidden_layers"]]:
        raise ConfigError(
            f"{place} has cross_attention_layers {outside} beyond the {fields['num_hidden_layers']} layers there are"
        )
    return TextConfig(
        **{**fields, "max_position_embeddings": longer_window(scaling, window)},
        **layer_kinds(fields["num_hidden_layers"], cross),
        extra_embeddings=EXTRA_EMBEDDINGS,
        head_dim=width,
        intermediate_size=0,
        intermediate_size_mlp=read_value(int, given["intermediate_size"], "intermediate_size", place),
        rope_theta=read_theta(rope, content, 500000.0, place),
        rope_scaling=scaling,
        num_local_experts=0,
        use_qk_norm=False,
        attention_chunk_size=None,
        attn_temperature_tuning=False,
    )


def _read_vision(content: Mapping[str, Any], counts_inputs: bool) -> TiledVisionConfig:
    VISION.check(content)
    place = VISION.place
    given = {**_VISION_DEFAULTS, **{name: value for name, value in content.items() if value is not None}}
    fields = read_fields(TiledVisionConfig, {name: given[name] for name in _VISION_SAME if name in given}, place)
    heads = given.get("attention_heads", given.get("num_attention_heads", 16))
    tiles = read_value(int, given["max_num_tiles"], "max_num_tiles", place)
    arrangements = [list(grid) for grid in grids(tiles)]
    if given.get("supported_aspect_ratios", arrangements) != arrangements:
        raise ConfigError(
            f"{place} has supported_aspect_ratios = {given['supported_aspect_ratios']!r:.200}, but "
            f"MllamaImageProcessor numbers those of at most {tiles} tiles as {arrangements}"
        )
    name = "intermediate_layers_indices"
    layers = read_value(tuple[int, ...], given.get(name, _INTERMEDIATE), name, place)
    return TiledVisionConfig(
        **fields,
        num_attention_heads=read_value(int, heads, "attention_heads", place),
        max_tiles=tiles,
        intermediate_layers=tuple(i - counts_inputs for i in layers),
    )


def _counts_inputs(content: Mapping[str, Any]) -> bool:
    """Whether `intermediate_layers_indices` are of layers' inputs, as Meta's code takes them and transformers 4 did. In
    transformers 5 they are of outputs, one layer on; published files, which are older, mean inputs."""
    match = re.match(r"(\d+)\.", str(content.get("transformers_version") or ""))
    return match is not None and int(match[1]) < 5


def write_config(config: Llama4Config) -> dict[str, Any]:
    """The content of config.json, from which transformers 5 makes the same model."""
    text, vision = config.text, config.vision
    assert isinstance(vision, TiledVisionConfig)
    decoder = {name: getattr(text, name) for name in (*_SAME, "bos_token_id", "pad_token_id")} | {
        "model_type": "mllama_text_model",
        "hidden_act": "silu",
        "intermediate_size": text.intermediate_size_mlp,
        "cross_attention_layers": list(text.cross_layers),
        "rope_parameters": write_rope(text.rope_theta, text.rope_scaling),
        "eos_token_id": list(text.eos_token_id) or None,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }
    tower = {name: getattr(vision, name) for name in _VISION_SAME} | {
        "model_type": "mllama_vision_model",
        "hidden_act": "gelu",
        "attention_heads": vision.num_attention_heads,
        "max_num_tiles": vision.max_tiles,
        "supported_aspect_ratios": [list(grid) for grid in vision.grids],
        "intermediate_layers_indices": list(vision.intermediate_layers),
        "dtype": config.dtype,
    }
    content = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": MllamaFamily.name,
        "image_token_index": config.image_token_index,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
        "text_config": decoder,
        "vision_config": tower,
    }
    if config.quantization_config is not None:
        content["quantization_config"] = dict(config.quantization_config)
    return content
