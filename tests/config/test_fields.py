"""Every field of transformers' classes is in a table: used, known to change nothing, or refused; and it is so."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import (
    Llama4ImageProcessor,
    Llama4Processor,
    Llama4TextConfig,
    Llama4VisionConfig,
    PreTrainedConfig,
)
from transformers.image_processing_utils import INIT_SERVICE_KWARGS
from transformers.modeling_rope_utils import RopeParameters
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from llama4.config import Llama4Config, fields, generation, image_json
from llama4.config.fields import FieldTable
from llama4.errors import ConfigError
from llama4.text import tokenizer_config
from tests import small_model
from tests.parity.references import ReferenceConfig, ReferenceModel, reference_config


def keywords(*functions: Any) -> set[str]:
    """Names that functions take out of their keyword arguments."""
    pattern = r"""kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"|"(\w+)" (?:not )?in (?:init_)?kwargs|kwargs\["(\w+)"\]"""
    found = (match for function in functions for match in re.findall(pattern, inspect.getsource(function)))
    return {name for match in found for name in match if name}


def of_config(cls: type[PreTrainedConfig]) -> set[str]:
    own = {each.name for each in dataclasses.fields(cls)}
    return own | set(cls.attribute_map) | set(cls().to_dict()) | keywords(PreTrainedConfig.__post_init__)


TABLES: dict[str, tuple[FieldTable, set[str]]] = {
    "config.json": (fields.CONFIG, of_config(ReferenceConfig)),
    "text_config": (fields.TEXT, of_config(Llama4TextConfig)),
    "vision_config": (fields.VISION, of_config(Llama4VisionConfig)),
    "rope_parameters": (fields.ROPE, set(RopeParameters.__annotations__)),
    "preprocessor_config.json": (
        image_json.IMAGE,
        {*Llama4ImageProcessor.valid_kwargs.__annotations__, *Llama4ImageProcessor().to_dict(), *INIT_SERVICE_KWARGS},
    ),
    "processor_config.json": (
        image_json.PROCESSOR,
        {*inspect.signature(Llama4Processor.__init__).parameters, "auto_map", "processor_class"} - {"self", "kwargs"},
    ),
    "tokenizer_config.json": (
        tokenizer_config.FIELDS,
        {
            *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
            *keywords(PreTrainedTokenizerBase.__init__, PreTrainedTokenizerBase._from_pretrained),
            *keywords(TokenizersBackend.__init__),
        },
    ),
}


def missing(table: FieldTable, names: Iterable[str]) -> list[str]:
    public = (name for name in names if not name.startswith("_"))
    return sorted(name for name in public if name not in table and name not in generation.FIELDS)


@pytest.mark.parametrize("place", TABLES)
def test_every_field_of_transformers_is_in_a_table(place: str) -> None:
    table, names = TABLES[place]
    assert len(names) > 10
    assert not missing(table, names)
    assert missing(table, {*names, "a_new_field"}) == ["a_new_field"]
    assert not set(table.used) & set(table.without_effect) and not set(table.used) & set(table.fixed)


def content(**changes: Any) -> dict[str, Any]:
    """config.json, with changes by path: text_config__hidden_act and so on."""
    whole = small_model.config().to_dict()
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = whole
        for parent in parents:
            place = place[parent]
        place[name] = value
    return whole


ROPE = {"rope_type": "linear", "factor": 2.0}
CHANGED: dict[str, dict[str, Any]] = {
    "text_config__": {
        **{"vocab_size": 1056, "hidden_size": 96, "intermediate_size": 16, "intermediate_size_mlp": 24},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24},
        **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-3, "tie_word_embeddings": True, "attention_bias": True},
        **{"num_experts_per_tok": 2, "num_local_experts": 4, "moe_layers": [1], "use_qk_norm": False},
        **{"attention_chunk_size": 64, "no_rope_layers": [1, 1, 0, 1], "layer_types": ["full_attention"] * 4},
        **{"attn_temperature_tuning": False, "floor_scale": 64, "attn_scale": 0.2},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
        **{"rope_parameters": ROPE, "rope_scaling": ROPE, "rope_theta": 7.0},
        **{"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "dtype": "float16", "torch_dtype": "float16"},
        **{"quantization_config": {"quant_method": "x"}, "quantization": {"bits": 4}},
    },
    "vision_config__": {
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 128},
        **{"image_size": 56, "patch_size": 7, "num_channels": 1, "pixel_shuffle_ratio": 1.0},
        **{"vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8},
        **{"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"rope_theta": 7.0}, "rope_theta": 7.0},
    },
    "": {
        **{"model_type": "llama4_text", "text_config": {"vocab_size": 1024}, "vision_config": None},
        **{"bos_token_id": 8, "eos_token_id": 9, "pad_token_id": 10},
        **{"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3},
        **{"boi_token_id": 1, "eoi_token_id": 2, "image_token_id": 3},
        **{"dtype": "float16", "torch_dtype": "float16"},
        **{"quantization_config": {"quant_method": "x"}, "quantization": {"bits": 4}},
    },
}
OF = {"text_config__": fields.TEXT, "vision_config__": fields.VISION, "": fields.CONFIG}
BEATEN_BY = {"rope_theta": "rope_parameters", "torch_dtype": "dtype"}
"""Fields that count where another is absent."""


def read(changed: dict[str, Any]) -> Llama4Config | str:
    """The model, or why the field no longer goes with the others."""
    try:
        return Llama4Config.from_dict(changed)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("place", CHANGED)
def test_used_fields_change_the_model_and_others_do_not(place: str) -> None:
    table, base = OF[place], Llama4Config.from_dict(content())
    assert set(CHANGED[place]) == set(table.used)
    for name, value in CHANGED[place].items():
        changed = content(**{place + name: value})
        parts = [changed, changed["text_config"], changed["vision_config"] or {}]
        for part in parts:
            part.pop(BEATEN_BY.get(name), None)
        if place == "text_config__" and name == "dtype":
            del changed["dtype"]
        for derived in {"moe_layers", "no_rope_layers", "layer_types"} - {name}:
            changed["text_config"].pop(derived, None)
        if place == "text_config__" and name.startswith("quantization"):  # of a text-only model
            changed = changed["text_config"]
        assert read(changed) != base, name
    odd = {place + name: "odd" for name in table.without_effect}
    assert Llama4Config.from_dict(content(**odd)) == base


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("text_config__hidden_act", "gelu", r"config\.json \(text_config\) has hidden_act = 'gelu'.* computes 'silu'"),
        ("text_config__partial_rotary_factor", 0.5, r"partial_rotary_factor = 0\.5"),
        ("text_config__per_layer_config", {"0": {"head_dim": 8}}, "per_layer_config"),
        ("text_config__rope_parameters", {"rope_type": "mystery", "factor": 2.0}, "'mystery' is not known"),
        ("text_config__rope_parameters", {"full_attention": {"rope_type": "default"}}, "full_attention"),
        ("text_config__rope_parameters", {"rope_type": "llama3", "factor": 2.0}, "lacks low_freq_factor and high_freq"),
        ("text_config__rope_scaling", {"type": "linear"}, "lacks factor"),
        ("text_config__layer_types", ["sliding_attention"] * 4, "sliding_attention"),
        ("vision_config__per_layer_config", {"0": {}}, "vision_config.* has per_layer_config"),
    ],
)
def test_what_cannot_be_computed_is_named(change: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama4Config.from_dict(content(**{change: value}))


def test_rope_scaling_beats_rope_parameters_as_in_transformers() -> None:
    rope = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    whole = content(text_config__rope_parameters=ROPE, text_config__rope_scaling=rope)
    ours = Llama4Config.from_dict(whole).to_dict()["text_config"]["rope_parameters"]
    theirs = Llama4TextConfig(**whole["text_config"]).to_dict()["rope_parameters"]
    for name in ("rope_type", "factor", "original_max_position_embeddings"):
        assert ours[name] == theirs[name], name


@torch.inference_mode()
def test_fields_without_effect_have_none_in_transformers() -> None:
    """The same weights and pixels with odd values in them: the same logits."""
    config = reference_config()
    odd = config.to_dict()
    training = {"attention_dropout": 0.5, "initializer_range": 9.0}
    routers = {"router_jitter_noise": 0.5, "router_aux_loss_coef": 9.0, "output_router_logits": True}
    odd["text_config"] |= training | routers | {"chunk_size_feed_forward": 3}
    odd["vision_config"] |= training | {"hidden_act": "relu", "norm_eps": 0.5, "projector_dropout": 0.5}
    odd["vision_config"] |= {"multi_modal_projector_bias": True, "vision_feature_select_strategy": "full"}
    odd |= {"tie_word_embeddings": True, "rope_theta": 3.0}
    torch.manual_seed(0)
    model = ReferenceModel(config).eval()
    other = ReferenceModel(ReferenceConfig(**odd)).eval()
    other.load_state_dict(model.state_dict())
    side = odd["vision_config"]["image_size"]
    ids = torch.tensor([[1, 2, *[config.image_token_index] * 4, 5]])
    pixels = torch.rand(1, 3, side, side)
    logits = [each(ids, pixel_values=pixels).logits for each in (model, other)]
    assert torch.equal(*logits)
    assert Llama4Config.from_dict(odd) == Llama4Config.from_dict(config.to_dict())
