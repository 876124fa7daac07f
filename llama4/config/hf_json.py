"""Hugging Face's config.json <-> the fields of `Llama4Config`.

Fields are passed as a dictionary, `{"text": TextConfig, "vision": VisionConfig or None, "dtype": "bfloat16", ...}`, and
`Llama4Config(**fields)` makes the configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama4.config.fields import CONFIG, ROPE, TEXT, VISION, names_of
from llama4.config.image_json import IMAGE_CONFIG_FILES, IMAGE_FIELDS, IMAGE_FILE, PROCESSOR_FILE, read_image_files
from llama4.config.rope import read_scaling, read_theta, rope_section, write_rope
from llama4.config.text import TextConfig
from llama4.config.typed import read_fields, read_value, section
from llama4.errors import ConfigError
from llama4.reading import read_json
from llama4.vision.config import VisionConfig

CONFIG_FILE = "config.json"
MODEL_TYPES = ("llama4", "llama4_text")
"""`model_type` of what is read here: a multimodal model, or the decoder alone."""
OTHER_MODELS = {
    "llama4": "a part of Llama 4 alone",
    "mllama": "a part of Llama 3.2 Vision alone",
    "ministral": "a model of Mistral AI",
    "mixtral": "a model of Mistral AI",
    "pixtral": "a model of Mistral AI",
    "gemma": "Google's Gemma",
    "t5gemma": "Google's Gemma",
    "qwen": "Alibaba's Qwen",
    "deepseek": "a model of DeepSeek",
    "gpt_oss": "OpenAI's gpt-oss",
    "gpt2": "OpenAI's GPT-2",
    "phi": "Microsoft's Phi",
    "granite": "IBM's Granite",
    "cohere": "Cohere's Command or Aya",
    "olmo": "Ai2's OLMo",
    "glm": "Zhipu's GLM",
    "chatglm": "Zhipu's GLM",
    "smollm": "Hugging Face's SmolLM",
    "falcon": "TII's Falcon",
    "nemotron": "NVIDIA's Nemotron",
    "bert": "BERT, an encoder",
    "clip": "CLIP, an encoder",
}
"""Beginning of `model_type` -> whose model it is: others that people try to load."""
IMAGE_TOKENS = {
    "boi_token_index": "boi_token_id",
    "eoi_token_index": "eoi_token_id",
    "image_token_index": "image_token_id",
}
"""Fields of config.json -> other names that they have there, and that count more."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Those of the whole model come before those of its decoder, as in transformers."""


def read_directory(directory: Path) -> dict[str, Any]:
    """The fields that the files of a model directory give.

    Raises:
        ConfigError: no config.json, a file that is not JSON, or a configuration that is not of a Llama 4 model.
    """
    fields = read_config(read_json(directory / CONFIG_FILE))
    if fields["vision"] is not None:
        paths = {name: directory / name for name in IMAGE_CONFIG_FILES}
        contents = {name: read_json(path) if path.is_file() else {} for name, path in paths.items()}
        image_fields = read_image_files(contents[PROCESSOR_FILE], contents[IMAGE_FILE], fields["vision"])
        fields["vision"] = dataclasses.replace(fields["vision"], **image_fields)
    return fields


def read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the content of config.json gives, for a multimodal or a text-only model.

    Raises:
        ConfigError: the configuration is not of a Llama 4 model, or has a value that cannot be.
    """
    model_type = content.get("model_type", "llama4")
    check_model_type(model_type)
    text_only = model_type == "llama4_text" or "text_config" not in content
    text = dict(content if text_only else section(content, "text_config", CONFIG_FILE))
    text |= {name: content[name] for name in TOKEN_IDS if content.get(name) is not None}
    has_vision = not text_only and content.get("vision_config") is not None
    if not text_only:
        CONFIG.check(content)
    dtypes = (part.get(name) for part in (content, text) for name in ("dtype", "torch_dtype"))
    quantization = (section(content, name, CONFIG_FILE) for name in ("quantization_config", "quantization"))
    ids = {name: content[key] for name, other in IMAGE_TOKENS.items() for key in (name, other) if key in content}
    return {
        "text": _read_text(text),
        "vision": _read_vision(section(content, "vision_config", CONFIG_FILE)) if has_vision else None,
        "dtype": read_value(str, next(filter(None, dtypes), "bfloat16"), "dtype", CONFIG_FILE),
        "quantization_config": next(filter(None, quantization), None),  # the second is MLX's
        **{name: read_value(int, value, name, CONFIG_FILE) for name, value in ids.items()},
    }


def _read_text(content: Mapping[str, Any]) -> TextConfig:
    TEXT.check(content)
    by_hand = ("rope_theta", "rope_scaling", "eos_token_id", "head_dim")
    given = {name: v for name, v in content.items() if name in TEXT.used and name not in by_hand}
    fields = read_fields(TextConfig, given, TEXT.place)
    rope = rope_section(content, TEXT.place)
    ROPE.check(rope)
    fields["rope_theta"] = read_theta(rope, content, 500000.0, TEXT.place)
    fields["rope_scaling"] = read_scaling(rope, fields.get("max_position_embeddings"), ROPE.place)
    eos = content.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    fields |= read_fields(TextConfig, {"eos_token_id": ids}, TEXT.place)
    if content.get("head_dim") is not None:
        fields |= read_fields(TextConfig, {"head_dim": content["head_dim"]}, TEXT.place)
    elif "head_dim" in content:
        sizes = [fields.get(name, getattr(TextConfig, name)) for name in ("hidden_size", "num_attention_heads")]
        fields["head_dim"] = sizes[0] // max(sizes[1], 1)
    try:
        return TextConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{TEXT.place}: {error}") from None


def _read_vision(content: Mapping[str, Any]) -> VisionConfig:
    VISION.check(content)
    used = {name: value for name, value in content.items() if name in VISION.used and name != "rope_theta"}
    fields = read_fields(VisionConfig, used, VISION.place)
    fields["rope_theta"] = read_theta(rope_section(content, VISION.place), content, 10000.0, VISION.place)
    try:
        return VisionConfig(**fields)
    except ValueError as error:
        raise ConfigError(f"{VISION.place}: {error}") from None


def write_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, which transformers reads back as the same model."""
    dtype, vision = fields["dtype"], fields["vision"]
    if vision is None:
        content = _write_text(fields["text"], dtype) | {"architectures": ["Llama4ForCausalLM"]}
    else:
        content = {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            **{name: fields[name] for name in IMAGE_TOKENS},
            "tie_word_embeddings": fields["text"].tie_word_embeddings,
            "dtype": dtype,
            "text_config": _write_text(fields["text"], dtype),
            "vision_config": _write_vision(vision, dtype),
        }
    if fields["quantization_config"] is not None:
        content["quantization_config"] = dict(fields["quantization_config"])
    return content


def _write_text(text: TextConfig, dtype: str) -> dict[str, Any]:
    values = {name: getattr(text, name) for name in TEXT.used if name in names_of(TextConfig)}
    content: dict[str, Any] = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    del content["rope_scaling"], content["rope_theta"]
    content["rope_parameters"] = write_rope(text.rope_theta, text.rope_scaling)
    return content | {"model_type": "llama4_text", "hidden_act": "silu", "dtype": dtype}


def _write_vision(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    content = {key: value for key, value in dataclasses.asdict(vision).items() if key not in IMAGE_FIELDS}
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": content.pop("rope_theta")}
    return content | {"model_type": "llama4_vision_model", "hidden_act": "gelu", "dtype": dtype}


def check_model_type(model_type: Any, known: Sequence[str] = MODEL_TYPES, title: str = "Llama 4") -> None:
    """Raises:
    ConfigError: a `model_type` that is not known.
    """
    if model_type not in known:
        about = next((name for prefix, name in OTHER_MODELS.items() if str(model_type).startswith(prefix)), None)
        other = f", and this is {about}, which transformers runs" if about else ""
        raise ConfigError(
            f"{CONFIG_FILE}: model_type {model_type!r:.80} is not {title}; this library runs "
            f"{' and '.join(map(repr, known))}{other}"
        )
