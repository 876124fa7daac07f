"""Mistral 7B and its like (`MistralForCausalLM`): dense Llama without biases, all of whose layers see a window that
slides over the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llama4.config import CONFIG_FILE, Llama4Config
from llama4.config.typed import read_value
from llama4.families import llama
from llama4.families.llama_presets import dense

FIELDS = replace(
    llama.FIELDS,
    used=(*(name for name in llama.FIELDS.used if name not in ("attention_bias", "mlp_bias")), "sliding_window"),
    fixed={**llama.FIELDS.fixed, "attention_bias": (False,), "mlp_bias": (False,), "layer_types": ()},
)
DEFAULTS: Mapping[str, Any] = {
    **llama.DEFAULTS,
    **{"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
"""transformers' MistralConfig."""


def _preset(**text: Any) -> Llama4Config:
    sizes = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = dense({**sizes, "intermediate_size_mlp": 14336, "max_position_embeddings": 32768, **text})
    return replace(config, family="mistral")


PRESETS: Mapping[str, Callable[[], Llama4Config]] = {
    "mistral-7b-v0.1": partial(_preset, sliding_window=4096),
    "mistral-7b-v0.2": partial(_preset, rope_theta=1e6),
    "mistral-7b-v0.3": partial(_preset, rope_theta=1e6, vocab_size=32768),
}


class MistralFamily(llama.LlamaFamily):
    """As dense Llama, but for the window."""

    name = "mistral"
    title = "Mistral"
    model_types = ("mistral",)
    presets = PRESETS
    fields = FIELDS
    defaults = DEFAULTS

    def config_of(self, content: Mapping[str, Any]) -> Llama4Config:
        config = super().config_of(content)
        window = read_value(int | None, {**DEFAULTS, **content}["sliding_window"], "sliding_window", CONFIG_FILE)
        return replace(config, text=replace(config.text, sliding_window=window))

    def write_config(self, config: Llama4Config) -> dict[str, Any]:
        content = super().write_config(config) | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": config.text.sliding_window,
        }
        return {name: value for name, value in content.items() if name not in ("attention_bias", "mlp_bias")}
