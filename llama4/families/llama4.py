"""Llama 4: Scout, Maverick, Guard 4, and their like."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama4.config import PRESETS, Llama4Config, fields
from llama4.config.fields import FieldTable
from llama4.config.hf_json import MODEL_TYPES
from llama4.families.base import Family
from llama4.families.names import NameTable
from llama4.text import prompt
from llama4.text.vocabulary import LLAMA4

MULTIMODAL = NameTable((("*", "*"),))
"""Llama4ForConditionalGeneration: the model's own names."""
TEXT_ONLY = NameTable((("model", "language_model.model"), ("lm_head", "language_model.lm_head")))
"""Llama4ForCausalLM: the decoder without a prefix."""


class Llama4Family(Family):
    """With a vision tower, or the decoder alone."""

    name = "llama4"
    title = "Llama 4"
    model_types = MODEL_TYPES
    presets = PRESETS
    vocabulary = LLAMA4

    def described(self, content: Mapping[str, Any]) -> Iterator[tuple[FieldTable, Mapping[str, Any]]]:
        text, vision = content.get("text_config"), content.get("vision_config") or {}
        if text is None:
            text = content
        else:
            yield fields.CONFIG, content
        yield fields.TEXT, text
        for part in (text, vision):
            for name in ("rope_parameters", "rope_scaling"):
                yield fields.ROPE, part.get(name) or {}
        yield fields.VISION, vision

    def read_config(self, directory: Path) -> Llama4Config:
        return Llama4Config.from_directory(directory)

    def write_config(self, config: Llama4Config) -> dict[str, Any]:
        return config.to_dict()

    def chat_template(self) -> str:
        return Path(prompt.__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

    def names(self, config: Llama4Config, keys: Collection[str] | None = None) -> NameTable:
        if keys is None:
            return TEXT_ONLY if config.vision is None else MULTIMODAL
        return TEXT_ONLY if any(key.startswith("model.layers.") for key in keys) else MULTIMODAL
