"""Dense Llama: Llama 1 to 3.3, Code Llama, and models of their architecture such as SmolLM2 and Vicuna."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from llama4.config import CONFIG_FILE, Llama4Config, TextConfig
from llama4.config.fields import METADATA, ROPE, FieldTable
from llama4.config.hf_json import TOKEN_IDS
from llama4.config.rope import LONGER, longer_window, read_scaling, read_theta, rope_section, write_rope
from llama4.config.typed import read_fields, read_value, section
from llama4.errors import ConfigError
from llama4.families.base import Family
from llama4.families.llama_presets import PRESETS
from llama4.families.names import HalvesToPairs, NameTable
from llama4.reading import read_json
from llama4.text.chat_formats import CHAT_FORMATS
from llama4.text.template_agreement import Compose
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import LLAMA3

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_SAME = (*_SIZES, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias")
"""Fields that have one name in config.json and in `TextConfig`."""

FIELDS = FieldTable(
    CONFIG_FILE,
    used=(
        *("model_type", *_SAME, *TOKEN_IDS, "intermediate_size"),
        *("rope_parameters", "rope_scaling", "rope_theta"),
        *("dtype", "torch_dtype", "quantization_config", "quantization"),
    ),
    without_effect={
        **METADATA,
        "pretraining_tp": "in how many parts products were computed in training",
        **dict.fromkeys(("max_sequence_length", "max_seq_len"), "max_position_embeddings counts"),
    },
    fixed={"hidden_act": ("silu",), "partial_rotary_factor": (1, 1.0), "per_layer_config": ({},)},
)

DEFAULTS: Mapping[str, Any] = {
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
"""What a file means that is silent on a field (transformers' LlamaConfig)."""


class LlamaFamily(Family):
    """The decoder without experts, every layer with RoPE over the whole context."""

    name = "llama"
    title = "Llama 1 to 3"
    model_types = ("llama",)
    presets = PRESETS
    vocabulary = LLAMA3
    fields: ClassVar[FieldTable] = FIELDS
    """Of config.json."""
    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS
    """What a file means that is silent on a field."""

    def described(self, content: Mapping[str, Any]) -> Iterator[tuple[FieldTable, Mapping[str, Any]]]:
        yield self.fields, content
        for name in ("rope_parameters", "rope_scaling"):
            yield ROPE, content.get(name) or {}

    def read_config(self, directory: Path) -> Llama4Config:
        return self.config_of(read_json(directory / CONFIG_FILE))

    def config_of(self, content: Mapping[str, Any]) -> Llama4Config:
        """From the content of config.json.

        Raises:
            ConfigError: a value that cannot be, or that asks for what this library does not compute.
        """
        return replace(read_config(content, self.fields, self.defaults), family=self.name)

    def write_config(self, config: Llama4Config) -> dict[str, Any]:
        text, scaling = config.text, config.text.rope_scaling
        content = {name: getattr(text, name) for name in _SAME} | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "intermediate_size": text.intermediate_size_mlp,
            "rope_parameters": write_rope(text.rope_theta, scaling),
            "bos_token_id": text.bos_token_id,
            "eos_token_id": list(text.eos_token_id) or None,
            "pad_token_id": text.pad_token_id,
            "dtype": config.dtype,
        }
        if scaling is not None and scaling.rope_type in LONGER:
            content["max_position_embeddings"] = scaling.original_max_position_embeddings
        if config.quantization_config is not None:
            content["quantization_config"] = dict(config.quantization_config)
        return content

    def chat_format(self, config: Llama4Config, tokenizer: Tokenizer) -> Compose | None:
        """Llama 3's, if its turns end replies: base models have the same tokens, and end with another. Llama 2's has no
        tokens of its own."""
        end = tokenizer.special_tokens.get(LLAMA3.eos)
        return CHAT_FORMATS["llama3"] if end is not None and end in config.text.eos_token_id else None

    def names(self, config: Llama4Config, keys: Collection[str] | None = None) -> NameTable:
        return NameTable(
            (
                ("model.layers.*.mlp", "language_model.model.layers.*.feed_forward"),
                ("model", "language_model.model"),
                ("lm_head", "language_model.lm_head"),
            ),
            ((r".*\.self_attn\.[qk]_proj", HalvesToPairs(config.text.head_dim)),),
            dropped=r".*\.rotary_emb\.inv_freq",
        )


def read_config(
    content: Mapping[str, Any], table: FieldTable = FIELDS, defaults: Mapping[str, Any] = DEFAULTS
) -> Llama4Config:
    """From the content of config.json.

    Args:
        table, defaults: of a family whose files are much like these.

    Raises:
        ConfigError: a value that cannot be, or that asks for what this library does not compute.
    """
    table.check(content)
    content = {**defaults, **content}
    heads = read_value(int, content["num_attention_heads"], "num_attention_heads", CONFIG_FILE)
    width = read_value(int, content["hidden_size"], "hidden_size", CONFIG_FILE)
    for name, value in {"num_key_value_heads": heads, "head_dim": width // max(heads, 1)}.items():
        content[name] = value if content.get(name) is None else content[name]
    eos = content.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    fields = read_fields(TextConfig, {name: content[name] for name in _SAME if name in content}, CONFIG_FILE)
    fields |= read_fields(TextConfig, {"eos_token_id": ids}, CONFIG_FILE)
    fields |= {
        name: read_value(int | None, content.get(name), name, CONFIG_FILE) for name in ("bos_token_id", "pad_token_id")
    }
    rope, window = rope_section(content, CONFIG_FILE), fields["max_position_embeddings"]
    ROPE.check(rope)
    scaling = read_scaling(rope, window, ROPE.place)
    fields["max_position_embeddings"] = longer_window(scaling, window)
    layers = fields["num_hidden_layers"]
    try:
        text = TextConfig(
            **fields,
            intermediate_size=0,
            intermediate_size_mlp=read_value(int, content["intermediate_size"], "intermediate_size", CONFIG_FILE),
            rope_theta=read_theta(rope, content, 10000.0, CONFIG_FILE),
            rope_scaling=scaling,
            num_local_experts=0,
            use_qk_norm=False,
            no_rope_layers=(1,) * layers,
            layer_types=("full_attention",) * layers,
            attention_chunk_size=None,
            attn_temperature_tuning=False,
        )
    except ConfigError as error:
        raise ConfigError(f"{CONFIG_FILE}: {error}") from None
    dtype = next(filter(None, (content.get(name) for name in ("dtype", "torch_dtype"))), "float32")
    quantization = (section(content, name, CONFIG_FILE) for name in ("quantization_config", "quantization"))
    return Llama4Config(
        text,
        vision=None,
        image_token_index=-1,
        dtype=read_value(str, dtype, "dtype", CONFIG_FILE),
        quantization_config=next(filter(None, quantization), None),
        family="llama",
    )
