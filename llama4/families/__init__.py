"""Families of models, by name. Reading, writing and prompting a model ask its family for what is particular to it."""

from __future__ import annotations

from typing import Any

from llama4.config import Llama4Config
from llama4.config.hf_json import check_model_type
from llama4.families.base import Family
from llama4.families.llama import LlamaFamily
from llama4.families.llama4 import Llama4Family
from llama4.families.mistral import MistralFamily
from llama4.families.mllama import MllamaFamily

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Llama4Family(), LlamaFamily(), MistralFamily(), MllamaFamily())
}
_SHAPES = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}
_MADE_OF = {
    **{"vicuna-7b": "llama-2-7b", "vicuna-13b": "llama-2-13b"},
    **{"llama-guard-1": "llama-2-7b", "llama-guard-2": "llama-3-8b", "llama-guard-3-1b": "llama-3.2-1b"},
    **{"llama-guard-3-8b": "llama-3.1-8b", "llama-guard-3-11b-vision": "llama-3.2-11b-vision"},
    "llama-guard-4": "guard4",
}
"""Models that others were trained further to."""
PRESETS = {**_SHAPES, **{name: _SHAPES[other] for name, other in _MADE_OF.items()}}


def family_of(config: Llama4Config) -> Family:
    return FAMILIES[config.family]


def family_of_type(model_type: Any) -> Family:
    """The family whose config.json has this `model_type`; files without one are Llama 4's.

    Raises:
        ConfigError: no family has it.
    """
    known = {name: family for family in FAMILIES.values() for name in family.model_types}
    if model_type is None:
        return FAMILIES["llama4"]
    check_model_type(model_type, tuple(known), " or ".join(family.title for family in FAMILIES.values()))
    return known[model_type]
