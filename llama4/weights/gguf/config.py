"""GGUF's metadata -> a configuration.

Keys begin with the architecture's name. What Llama 4's files do not say (chunk, temperature, layers without RoPE,
QK-norm) is as llama.cpp sets it (src/models/llama4.cpp), unless keys of our own say it: see `OWN`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from llama4.config import Llama4Config, TextConfig
from llama4.config.rope import RopeScaling
from llama4.errors import ConfigError
from llama4.gguf import GgufFile, Keys
from llama4.reading import LIMITS
from llama4.text.gguf_vocabulary import read_tokens
from llama4.text.sentencepiece import Kind
from llama4.vision.config import VisionConfig
from llama4.weights.gguf.files import FLOATS, GgufModel, GgufTensors, architecture_of
from llama4.weights.gguf.names import ROPE_DIVISORS

OWN = {
    "chunk": "attention.chunk_size",
    "temperature": "attention.temperature_scale",
    "floor": "attention.temperature_floor",
    "nope": "attention.no_rope_layers",
    "qk_norm": "attention.qk_norm",
    "sliding": "attention.sliding_window",
}
"""Keys of ours, behind the architecture: the chunk's tokens (0: none); the scale (0: no tuning of the temperature) and
the tokens after which it grows; per layer whether RoPE is used, 1, or not; whether queries and keys are normalised;
Mistral's window (0: none)."""
YARN_FACTOR = "rope.scaling.attn_factor"
"""Key of what queries and keys are multiplied by under yarn, beside what follows from its factor."""
_SCALED = ("attention.scale", "attention.clamp_kqv", "logit_scale", "embedding_scale", "residual_scale")
"""Keys of other models, which change what is computed."""
_IMAGE_TOKENS = {
    "boi_token_index": "<|image_start|>",
    "eoi_token_index": "<|image_end|>",
    "image_token_index": "<|patch|>",
}
_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ENDS = (
    *("<|eot|>", "<|eom|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>"),
    *("<|end|>", "</s>", "<EOT>"),
)
"""Names of control tokens that end a reply even where no key says so, as in llama.cpp."""


def read_config(model: GgufModel, tensors: GgufTensors) -> Llama4Config:
    """The configuration of a model.

    Args:
        tensors: of all its files but the vision tower's: what is there says more than keys do.

    Raises:
        ConfigError: an architecture that is not run, or a value that cannot be.
    """
    place, file = str(model.path), model.files[0]
    architecture = architecture_of(file)
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{place} holds a model of architecture {architecture!r:.80}; this library runs "
            f"{' and '.join(map(repr, ARCHITECTURES))}, and llama.cpp all others"
        )
    keys = file.keys(architecture)
    if scaled := [f"{architecture}.{key}" for key in _SCALED if key in keys]:
        raise ConfigError(f"{place} has {', '.join(scaled)}, which this library does not compute; run it by llama.cpp")
    names = set(tensors.names())
    if "token_embd.weight" not in names:
        raise ConfigError(f"{place} has no token_embd.weight, and so no weights; Tokenizer({place!r}) reads the rest")
    vocabulary, width = (*tensors.tensor("token_embd.weight").shape, 0)[:2]
    heads = max(keys.integer("attention.head_count", limit=LIMITS["num_attention_heads"]), 1)
    head_dim = keys.integer("attention.key_length", width // heads)
    tokens = file.keys("tokenizer.ggml")
    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": keys.integer("block_count", limit=LIMITS["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size_mlp": keys.integer("feed_forward_length"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": _theta(keys),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        **{f"{name}_token_id": tokens.token(f"{key}_token_id") for name, key in (("bos", "bos"), ("pad", "padding"))},
        "eos_token_id": reply_ends(tokens),
    }
    for key, other in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if keys.integer(key, head_dim) != other:
            raise ConfigError(f"{place}: {architecture}.{key} is not the {head_dim} of keys, which is not run")
    try:
        fields |= ARCHITECTURES[architecture](keys, fields["num_hidden_layers"])
        text = TextConfig(**fields, rope_scaling=_rope_scaling(keys, tensors, head_dim))
    except ConfigError as error:
        raise error if str(error).startswith(place) else ConfigError(f"{place}: {error}") from None
    images: dict[str, Any] = {"image_token_index": -1}
    if model.mmproj is not None:
        known = tokens.texts("tokens")
        images = {field: known.index(name) for field, name in _IMAGE_TOKENS.items() if name in known}
    vision = read_vision(model.mmproj) if model.mmproj is not None else None
    family = architecture if text.sliding_window is None else "mistral"
    return Llama4Config(text, vision, dtype=_dtype(model, tensors), family=family, **images)


def reply_ends(tokens: Keys) -> tuple[int, ...]:
    """The tokens that end a reply."""
    said = map(tokens.token, _EOS)
    names, kinds = read_tokens(tokens) if "tokens" in tokens else ([], [])
    named = (i for i, name in enumerate(names) if name in _ENDS and kinds[i] is Kind.CONTROL)
    return tuple(dict.fromkeys(i for i in (*said, *named) if i is not None))


def _dtype(model: GgufModel, tensors: GgufTensors) -> str:
    """That of the decoder's largest tensor; of one that is quantized, bfloat16. A vision tower is often in float32,
    whatever the model is in."""
    others = model.mmproj.tensors.keys() if model.mmproj is not None else ()
    own = (tensors.tensor(name) for name in tensors.names() if name not in others)
    largest = max(own, key=lambda tensor: tensor.nbytes)
    return str(FLOATS.get(largest.type.name, FLOATS["BF16"])).removeprefix("torch.")


def _llama4(keys: Keys, layers: int) -> dict[str, Any]:
    experts = keys.integer("expert_count", 0, LIMITS["num_local_experts"])
    scale = keys.number(OWN["temperature"], 0.1)
    chunk = keys.integer(OWN["chunk"], 8192)
    no_rope = keys.metadata.get(f"{keys.prefix}.{OWN['nope']}")
    is_list = isinstance(no_rope, np.ndarray) and len(no_rope) == layers and {*no_rope.tolist()} <= {0, 1}
    if no_rope is not None and not is_list:
        raise ConfigError(f"{keys.prefix}.{OWN['nope']} must have 0 or 1 for each of {layers} layers")
    rope = (
        tuple(int(i) for i in no_rope) if no_rope is not None else tuple(int((i + 1) % 4 != 0) for i in range(layers))
    )
    kinds = tuple("chunked_attention" if uses_rope and chunk else "full_attention" for uses_rope in rope)
    return {
        "intermediate_size": keys.integer("expert_feed_forward_length", 0),
        "num_local_experts": experts,
        "num_experts_per_tok": keys.integer("expert_used_count", 0),
        "interleave_moe_layer_step": keys.integer("interleave_moe_layer_step", 1),
        "use_qk_norm": keys.flag(OWN["qk_norm"], experts != 128),
        "no_rope_layers": rope,
        "layer_types": kinds,
        "attention_chunk_size": chunk or None,
        "attn_temperature_tuning": scale > 0,
        "attn_scale": scale,
        "floor_scale": keys.integer(OWN["floor"], 8192),
    }


def _llama(keys: Keys, layers: int) -> dict[str, Any]:
    if experts := keys.integer("expert_count", 0):
        raise ConfigError(f"{keys.prefix}.expert_count is {experts}: Mixtral and its like are not run here")
    return {
        "intermediate_size": 0,
        "num_local_experts": 0,
        "use_qk_norm": False,
        "no_rope_layers": (1,) * layers,
        "layer_types": ("full_attention",) * layers,
        "attention_chunk_size": None,
        "sliding_window": keys.integer(OWN["sliding"], 0) or None,
        "attn_temperature_tuning": False,
    }


ARCHITECTURES: dict[str, Callable[[Keys, int], dict[str, Any]]] = {"llama4": _llama4, "llama": _llama}
"""Architecture, which is the family's name but for Mistral's -> what is particular to its configuration."""


def _rope_scaling(keys: Keys, tensors: GgufTensors, head_dim: int) -> RopeScaling | None:
    """RoPE's scaling: divisors, which are of the rule `llama3` or of none that is known, or a rule by its keys."""
    if ROPE_DIVISORS in tensors.names():
        return _by_divisors(tensors.read(ROPE_DIVISORS).double().tolist(), keys, head_dim)
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    if kind in ("none", "linear"):
        original = max(2, round(keys.integer("context_length") / max(factor, 1)))
        return RopeScaling("linear", factor, original_max_position_embeddings=original) if factor != 1 else None
    if kind != "yarn":
        raise ConfigError(f"{keys.place}: {keys.prefix}.rope.scaling.type {kind!r:.80} is not run")
    usual = RopeScaling("yarn", factor).yarn_attention_factor
    return RopeScaling(
        "yarn",
        factor,
        attention_factor=usual * keys.number(YARN_FACTOR, 1.0) if YARN_FACTOR in keys else None,
        original_max_position_embeddings=keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _theta(keys: Keys) -> float:
    theta = keys.number("rope.freq_base", 10000.0)
    if theta <= 0:
        raise ConfigError(f"{keys.place}: {keys.prefix}.rope.freq_base is {theta}, which must be above 0")
    return theta


_WINDOWS = (8192, *(2**n for n in range(4, 24)))
"""What the original window may be, the most common first."""


def _by_divisors(divisors: list[float], keys: Keys, head_dim: int) -> RopeScaling:
    theta = _theta(keys)
    if len(divisors) != head_dim // 2 or not all(1 <= divisor < 1e6 for divisor in divisors):
        raise ConfigError(f"{keys.place}: {ROPE_DIVISORS} must have {head_dim // 2} numbers from 1 on")
    factor = round(max(divisors), 4)
    bands = {"llama4": ((1.0, 1.0), (1.0, 4.0))}.get(keys.prefix, ((1.0, 4.0), (1.0, 1.0)))
    for (low, high), window in itertools.product(bands, _WINDOWS):
        scaling = RopeScaling("llama3", factor, low, high, window)
        if np.allclose(divisors, llama3_divisors(scaling, theta, head_dim), rtol=1e-5):
            return scaling
    factors = tuple(float(divisor) for divisor in divisors)
    return RopeScaling("longrope", 1.0, attention_factor=1.0, short_factor=factors, long_factor=factors)


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What the rule `llama3` divides the frequency of each pair by, [C / 2]: see model/positions.py."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((rotations - low) / max(high - low, 1e-30)).clip(0, 1)
    return 1 / ((1 - blend) / scaling.factor + blend)


def read_vision(file: GgufFile) -> VisionConfig:
    """The vision tower that a file of its own holds.

    Raises:
        ConfigError: it is not Llama 4's.
    """
    metadata, place = file.metadata, str(file.path)
    projector = file.keys("clip").text("projector_type", file.keys("clip.vision").text("projector_type", ""))
    if projector != "llama4":
        raise ConfigError(f"{place} holds the vision tower of {projector!r:.80}, and not of 'llama4'")
    keys = file.keys("clip.vision")
    adapter = file.tensors.get("mm.model.mlp.2.weight")
    if adapter is None:
        raise ConfigError(f"{place} lacks mm.model.mlp.2.weight; fetch the file again")
    found = ((name, metadata.get(f"clip.vision.{name}")) for name in ("image_mean", "image_std"))
    means: dict[str, Any] = {name: tuple(map(float, value)) for name, value in found if isinstance(value, np.ndarray)}
    try:
        return VisionConfig(
            hidden_size=keys.integer("embedding_length"),
            num_hidden_layers=keys.integer("block_count", limit=LIMITS["num_hidden_layers"]),
            num_attention_heads=keys.integer("attention.head_count", limit=LIMITS["num_attention_heads"]),
            intermediate_size=keys.integer("feed_forward_length"),
            vision_output_dim=adapter.shape[0],
            projector_input_dim=adapter.shape[0],
            projector_output_dim=adapter.shape[0],
            image_size=keys.integer("image_size", limit=LIMITS["image_size"]),
            patch_size=keys.integer("patch_size", limit=LIMITS["patch_size"]),
            pixel_shuffle_ratio=1 / max(keys.integer("projector.scale_factor", 2), 1),
            norm_eps=keys.number("attention.layer_norm_epsilon", 1e-5),
            max_tiles=keys.integer("preproc_max_tiles", 16, LIMITS["max_tiles"]),
            **means,
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
