"""Meta's `params.json` of Llama 1 to 3.3 and Code Llama <-> our configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4.config import Llama4Config, RopeScaling, TextConfig
from llama4.config.typed import section
from llama4.errors import ConfigError, Llama4Error
from llama4.reading import read_json
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import LLAMA3, LLAMA3_RANKS, SENTENCEPIECE
from llama4.weights.meta.params import (
    PARAMS_FILE,
    DecoderParams,
    check_nothing_is_lost,
    dense_width,
    lost_fields,
    read_object,
)

_LLAMA4 = ("moe_args", "vision_args", "nope_layer_interval", "attention_chunk_size", "use_qk_norm", "ffn_exp")
"""Fields that only Llama 4's files have."""
_WIDTHS = ((256, None), (256, 1.0), (256, 1.5), (1024, 1.3), (4096, 1.3), (4096, 1.2), (2048, 1.3))
"""`multiple_of` and `ffn_dim_multiplier` of released models."""
_LONG = 131072


@dataclass(frozen=True)
class _Params(DecoderParams):
    """That of Llama 1 to 3."""

    rope_theta: float = 10000.0


def is_llama(params: Mapping[str, Any]) -> bool:
    """Whether the content of a `params.json` is of Llama 1 to 3; that of Llama 4 has fields that these lack."""
    params = section(params, "model", PARAMS_FILE) or params
    return not any(name in params for name in _LLAMA4)


def read_params(directory: Path) -> Llama4Config:
    """The configuration in a directory of Meta's layout; the tokenizer says how many tokens there are, where
    `vocab_size` is -1, and which begin and end texts.

    Raises:
        ConfigError: a `params.json` that is damaged or of another model.
    """
    path = directory / PARAMS_FILE
    tokenizer = (
        Tokenizer(directory / "tokenizer.model", vocabulary=LLAMA3)
        if (directory / "tokenizer.model").is_file()
        else None
    )
    try:
        return config_from_params(read_json(path), tokenizer)
    except (Llama4Error, ArithmeticError) as error:
        raise ConfigError(f"{path} is damaged, or not of a Llama model: {error}") from error


def config_from_params(params: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> Llama4Config:
    """Build from the content of `params.json`.

    The window is not among Meta's fields: it is what we wrote as `max_position_embeddings`, else that of the generation
    whose base of RoPE and epsilon these are. Replies of Llama 3 end at whichever of its tokens ends them, as base and
    instructed models have the same file.
    """
    params = read_object(_Params, section(params, "model", PARAMS_FILE) or params, PARAMS_FILE)
    heads, layers, size = params["n_heads"], params["n_layers"], params.get("vocab_size", -1)
    theta, scaled = float(params.get("rope_theta", 10000.0)), params.get("use_scaled_rope", False)
    if size < 1:
        size = tokenizer.vocab_size if tokenizer is not None else 32000
    is_sentencepiece = size < LLAMA3_RANKS if tokenizer is None else tokenizer.vocabulary is SENTENCEPIECE
    first = len(tokenizer.ranks) if tokenizer is not None else size - LLAMA3.num_special_tokens
    # Llama 3.2's two small models were trained with 32, and their files do not say so; Meta's own code has 8.
    factor = params.get("rope_scaling_factor") or (32.0 if params["dim"] in (2048, 3072) else 8.0)
    text = TextConfig(
        vocab_size=size,
        hidden_size=params["dim"],
        intermediate_size=0,
        intermediate_size_mlp=dense_width(params),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_dim=params["dim"] // max(heads, 1),
        max_position_embeddings=params.get("max_position_embeddings") or _window(theta, scaled, params),
        rms_norm_eps=params.get("norm_eps", 1e-5),
        num_local_experts=0,
        use_qk_norm=False,
        rope_theta=theta,
        rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, 8192) if scaled else None,
        no_rope_layers=(1,) * layers,
        layer_types=("full_attention",) * layers,
        attention_chunk_size=None,
        attn_temperature_tuning=False,
        bos_token_id=1 if is_sentencepiece else first,
        eos_token_id=(2,) if is_sentencepiece else (),
        pad_token_id=None if is_sentencepiece else first + 4,
    )
    return Llama4Config(text, vision=None, image_token_index=-1, family="llama")


def _window(theta: float, scaled: bool, params: Mapping[str, Any]) -> int:
    if scaled:
        return _LONG
    if theta != 10000.0:
        return 16384 if theta == 1e6 else 8192
    return 2048 if params.get("norm_eps", 1e-5) < 1e-5 else 4096


def params_from_config(config: Llama4Config) -> dict[str, Any]:
    """The content of `params.json`, from which `config_from_params` makes the same configuration.

    Raises:
        CheckpointError: a property of the model that Meta's format has no field for.
    """
    text, scaling = config.text, config.text.rope_scaling
    params: dict[str, Any] = {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": scaling is not None,
        "max_position_embeddings": text.max_position_embeddings,
    }
    if scaling is not None:
        params["rope_scaling_factor"] = scaling.factor
    width = text.intermediate_size_mlp
    own = (width, width / int(8 * text.hidden_size / 3))
    for multiple, multiplier in (*_WIDTHS, own):
        choice = {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
        if dense_width({**params, **choice}) == width:
            break
    params |= choice
    back = config_from_params(params).text
    ours = {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "intermediate_size"}
    ours |= {"moe_layers", "interleave_moe_layer_step", "no_rope_layer_interval"}
    names = [name for name in TextConfig.__dataclass_fields__ if name not in ours]
    check_nothing_is_lost(lost_fields(text, back, names))
    return params
