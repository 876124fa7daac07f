"""Hugging Face's config.json and preprocessor_config.json <-> the fields of `Llama4Config`.

Fields are passed as a dictionary, `{"text": TextConfig, "vision": VisionConfig or None, "dtype": "bfloat16", ...}`, and
`Llama4Config(**fields)` makes the configuration.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama4.config.fields import CONFIG, ROPE, TEXT, VISION
from llama4.config.image_json import IMAGE_FILE, PROCESSOR_FILE, read_image_files
from llama4.config.text import RopeScaling, TextConfig
from llama4.errors import ConfigError
from llama4.vision.config import RESAMPLE, VisionConfig

CONFIG_FILE = "config.json"
MODEL_TYPES = ("llama4", "llama4_text")
"""`model_type` of what is read here: a multimodal model, or the decoder alone."""
OTHER_MODELS = {
    "llama4": "a part of Llama 4 alone",
    "mllama": "Llama 3.2 Vision",
    "llama": "Llama 1, 2 or 3, or a model of that shape",
    "mistral": "a model of Mistral AI",
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
IMAGE_CONFIG_FILES = (IMAGE_FILE, PROCESSOR_FILE)
IMAGE_TOKENS = {
    "boi_token_index": "boi_token_id",
    "eoi_token_index": "eoi_token_id",
    "image_token_index": "image_token_id",
}
"""Fields of config.json -> other names that they have there, and that count more."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Those of the whole model come before those of its decoder, as in transformers."""
IMAGE_FIELDS = ("max_tiles", "resize_to_max_canvas", "resample", "rescale_factor", "image_mean", "image_std")
"""Fields of `VisionConfig` that are not in config.json but in the image processor's file."""


def read_directory(directory: Path) -> dict[str, Any]:
    """The fields that the files of a model directory give.

    Raises:
        ConfigError: no config.json, a file that is not JSON, or a configuration that is not of a Llama 4 model.
    """
    fields = read_config(load_json(directory / CONFIG_FILE))
    if fields["vision"] is not None:
        paths = {name: directory / name for name in IMAGE_CONFIG_FILES}
        contents = {name: load_json(path) if path.is_file() else {} for name, path in paths.items()}
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
    try:
        return _read_config(content, text_only=model_type == "llama4_text" or "text_config" not in content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the configuration has a value of the wrong kind, or lacks one: {error}") from error


def _read_config(content: Mapping[str, Any], text_only: bool) -> dict[str, Any]:
    text = dict(content if text_only else content["text_config"])
    text |= {name: content[name] for name in TOKEN_IDS if content.get(name) is not None}
    vision = None if text_only else content.get("vision_config")
    if not text_only:
        CONFIG.check(content)
    dtypes = (part.get(name) for part in (content, text) for name in ("dtype", "torch_dtype"))
    return {
        "text": _read_text(text),
        "vision": _read_vision(vision) if vision is not None else None,
        "dtype": str(next(filter(None, dtypes), "bfloat16")),
        "quantization_config": content.get("quantization_config") or content.get("quantization"),  # the latter is MLX's
        **{name: content[key] for name, other in IMAGE_TOKENS.items() for key in (name, other) if key in content},
    }


def _read_text(content: Mapping[str, Any]) -> TextConfig:
    TEXT.check(content)
    fields = _known_fields(TextConfig, content)
    rope = _rope(content)
    fields["rope_theta"] = _theta(rope, content, 500000.0)
    fields["rope_scaling"] = _read_scaling(rope, content.get("max_position_embeddings"))
    eos = fields.get("eos_token_id")
    if not isinstance(eos, tuple):
        fields["eos_token_id"] = () if eos is None else (eos,)
    if "head_dim" in fields and fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    return TextConfig(**fields)


def _rope(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Older files have `rope_scaling`, which counts more."""
    rope: Mapping[str, Any] = content.get("rope_scaling") or content.get("rope_parameters") or {}
    return rope


def _theta(rope: Mapping[str, Any], content: Mapping[str, Any], default: float) -> float:
    return float(rope.get("rope_theta", content.get("rope_theta", default)))


def _read_scaling(rope: Mapping[str, Any], window: int | None) -> RopeScaling | None:
    ROPE.check(rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    fields = _known_fields(RopeScaling, rope) | {"rope_type": kind}
    if kind == "llama3" and window is not None:
        fields.setdefault("original_max_position_embeddings", window)
    needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "linear": ("factor",)}.get(kind, ())
    if missing := [name for name in needed if fields.get(name) is None]:
        raise ConfigError(
            f"{ROPE.place} of type {kind!r} lacks {' and '.join(missing)}; write what the model was trained with"
        )
    return RopeScaling(**fields)


def _read_vision(content: Mapping[str, Any]) -> VisionConfig:
    VISION.check(content)
    fields = {name: value for name, value in _known_fields(VisionConfig, content).items() if name in VISION.used}
    fields["rope_theta"] = _theta(_rope(content), content, 10000.0)
    try:
        return VisionConfig(**fields)
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
    content: dict[str, Any] = {
        key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(text).items()
    }
    scaling, theta = content.pop("rope_scaling"), content.pop("rope_theta")
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
    return content | {"model_type": "llama4_text", "hidden_act": "silu", "dtype": dtype}


def _write_vision(vision: VisionConfig, dtype: str) -> dict[str, Any]:
    content = {key: value for key, value in dataclasses.asdict(vision).items() if key not in IMAGE_FIELDS}
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": content.pop("rope_theta")}
    return content | {"model_type": "llama4_vision_model", "hidden_act": "gelu", "dtype": dtype}


def write_image_config(vision: VisionConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json, for transformers' Llama4ImageProcessor."""
    return {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "max_patches": vision.max_tiles,
        "resize_to_max_canvas": vision.resize_to_max_canvas,
        "resample": RESAMPLE[vision.resample],
        "do_rescale": True,
        "rescale_factor": vision.rescale_factor,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def write_processor_config(vision: VisionConfig) -> dict[str, Any]:
    """The content of processor_config.json, for transformers' Llama4Processor."""
    return {
        "processor_class": "Llama4Processor",
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "image_token": "<|image|>",
        "fake_image_token": "<|image|>",
    }


def check_model_type(model_type: Any, known: Sequence[str] = MODEL_TYPES, title: str = "Llama 4") -> None:
    """Raises:
    ConfigError: a `model_type` that is not known.
    """
    if model_type not in known:
        about = next((name for prefix, name in OTHER_MODELS.items() if str(model_type).startswith(prefix)), None)
        other = f", and this is {about}, which transformers runs" if about else ""
        raise ConfigError(
            f"model_type {model_type!r} is not {title}; this library runs {' and '.join(map(repr, known))}{other}"
        )


def load_json(path: Path) -> dict[str, Any]:
    """Raises:
    ConfigError: no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: a model directory in Hugging Face's layout holds {path.name} beside its weights"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _known_fields(cls: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: _freeze(value) for key, value in content.items() if key in names}


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
