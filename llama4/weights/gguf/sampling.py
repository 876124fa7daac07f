"""How tokens are chosen, as a GGUF file says it (`general.sampling.*`), and as generation_config.json does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama4.config import GenerationConfig
from llama4.config.generation import SAMPLED
from llama4.gguf import GgufFile

_PREFIX = "general.sampling"
_KEYS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Field -> key."""
_REPEATED_IN = "penalty_last_n"
"""Key of how many tokens the penalty looks back at; -1: all."""


def read_sampling(file: GgufFile) -> dict[str, Any]:
    """Fields of generation_config.json; {} where the file says nothing. A temperature of 0 or less is greedy.

    Raises:
        ConfigError: a value that is no number.
    """
    keys = file.keys(_PREFIX)
    said = {field: keys.number(key, 0.0) for field, key in _KEYS.items() if key in keys}
    if not said:
        return {}
    if "top_k" in said:
        said["top_k"] = max(0, int(said["top_k"]))
    said |= {name: min(max(0.0, said[name]), 1.0) for name in ("top_p", "min_p") if name in said}
    draws = said.get("temperature", 1.0) > 0
    if not draws:
        del said["temperature"]
    return {"do_sample": draws, **said}


def sampling_metadata(generation: GenerationConfig) -> dict[str, Any]:
    """The keys for what a generation_config.json says, so that llama.cpp's own defaults do not stand in for what is
    not said; none where it does not say whether to draw tokens."""
    if "do_sample" not in generation.content:
        return {}
    fields: Mapping[str, float] = generation.sampling() if not generation.refused else {}
    said = {**SAMPLED, **fields} if generation.do_sample else {**fields, "temperature": 0.0}
    if generation.do_sample and "top_k" not in fields:
        said["top_k"] = 0  # all
    found: dict[str, Any] = {
        f"{_PREFIX}.{key}": int(said[field]) if field == "top_k" else float(said[field])
        for field, key in _KEYS.items()
        if field in said
    }
    if "repetition_penalty" in said:
        found[f"{_PREFIX}.{_REPEATED_IN}"] = -1
    return found
