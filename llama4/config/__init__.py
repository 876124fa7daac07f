"""The shape of a Llama 4 model: frozen dataclasses in Hugging Face's field names, presets, and parameter counts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama4.errors import ConfigError
from llama4.vision.config import VisionConfig

CACHE_BLOCK = 256
"""Tokens for which a key/value cache takes memory at once."""
CONFIG_FILE = "config.json"
IMAGE_CONFIG_FILES = ("preprocessor_config.json", "processor_config.json")
CACHE_BITS = {"fp8": 8, "int8": 8, "int4": 4}
"""Formats of few bits that the growing part of a cache can have -> bits of a number."""
CACHE_SCALE_BYTES = 2
"""What such a format adds for the numbers of a token and head: one bfloat16."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are lowered for long contexts. `llama3`: see `layers.rope_frequencies`; `linear`: all by
    `factor`."""

    rope_type: str = "llama3"
    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("llama3", "linear"):
            raise ConfigError(
                f"rope_type {self.rope_type!r} is not known; Llama 4 models use 'llama3', 'linear' or none"
            )
        if self.factor < 1 or not 0 < self.low_freq_factor <= self.high_freq_factor:
            raise ConfigError(
                f"RoPE scaling needs factor >= 1 and 0 < low_freq_factor <= high_freq_factor, not {self.factor}, "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class TextConfig:
    """The decoder. The defaults are Llama 4 Scout's.

    `no_rope_layers[i]` is 1 where layer i USES RoPE (the name is Hugging Face's); `moe_layers` lists the layers that
    have experts. Left as None, both follow from their intervals; after construction they are always tuples.
    """

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192
    """Width of an expert, and of the shared expert."""
    intermediate_size_mlp: int = 16384
    """Width of the MLP of layers without experts."""
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 10485760
    """The window, in tokens."""
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    num_experts_per_tok: int = 1
    num_local_experts: int = 16
    moe_layers: tuple[int, ...] | None = None
    interleave_moe_layer_step: int = 1
    use_qk_norm: bool = True
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4
    attention_chunk_size: int | None = 8192
    layer_types: tuple[str, ...] | None = None
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    bos_token_id: int | None = 200000
    eos_token_id: tuple[int, ...] = (200001, 200007, 200008)
    pad_token_id: int | None = 200018

    def __post_init__(self) -> None:
        layers, interval = self.num_hidden_layers, self.no_rope_layer_interval
        if self.num_local_experts == 0:
            moe: tuple[int, ...] = ()
        elif self.moe_layers is None:
            moe = tuple(range(self.interleave_moe_layer_step - 1, layers, self.interleave_moe_layer_step))
        else:
            moe = tuple(self.moe_layers)
        rope = tuple(self.no_rope_layers or (int((i + 1) % interval != 0) for i in range(layers)))[:layers]
        kinds = self.layer_types or ("chunked_attention" if uses_rope else "full_attention" for uses_rope in rope)
        set_field = object.__setattr__
        set_field(self, "moe_layers", moe)
        set_field(self, "no_rope_layers", rope)
        set_field(self, "layer_types", tuple(kinds))
        set_field(self, "attn_temperature_tuning", bool(self.attn_temperature_tuning))
        self._check()

    def _check(self) -> None:
        positive = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in (*positive, "head_dim", "intermediate_size", "max_position_embeddings", "num_experts_per_tok"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even (RoPE turns pairs), not {self.head_dim}")
        if self.moe_layers and self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_local_experts {self.num_local_experts}"
            )
        if self.attention_chunk_size is not None and self.attention_chunk_size < 1:
            raise ConfigError(f"attention_chunk_size must be at least 1 or null, not {self.attention_chunk_size}")
        for name, values in (("no_rope_layers", self.no_rope_layers), ("layer_types", self.layer_types)):
            if values is None or len(values) != self.num_hidden_layers:
                raise ConfigError(f"{name} must name all {self.num_hidden_layers} layers, not {values}")
        if unknown := set(self.layer_types or ()) - {"chunked_attention", "full_attention"}:
            raise ConfigError(f"layer_types may hold chunked_attention and full_attention, not {sorted(unknown)}")
        if any(not 0 <= i < self.num_hidden_layers for i in self.moe_layers or ()):
            raise ConfigError(
                f"moe_layers {self.moe_layers} names layers beyond the {self.num_hidden_layers} there are"
            )

    def uses_rope(self, layer: int) -> bool:
        assert self.no_rope_layers is not None
        return bool(self.no_rope_layers[layer])

    def uses_experts(self, layer: int) -> bool:
        assert self.moe_layers is not None
        return layer in self.moe_layers

    def window(self, layer: int) -> int | None:
        """Chunk length of a layer's attention, in tokens; None where a token sees all that came before."""
        assert self.layer_types is not None
        return self.attention_chunk_size if self.layer_types[layer] == "chunked_attention" else None

    def _attention_parameters(self) -> int:
        width, queries = self.hidden_size, self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        bias = (queries + 2 * keys + width) if self.attention_bias else 0
        return width * (2 * queries + 2 * keys) + bias

    def _count(self, experts: int) -> int:
        width = self.hidden_size
        expert = 3 * width * self.intermediate_size
        moe = (experts + 1) * expert + width * self.num_local_experts
        dense = 3 * width * self.intermediate_size_mlp
        mlps = sum(moe if self.uses_experts(i) else dense for i in range(self.num_hidden_layers))
        norms = (2 * self.num_hidden_layers + 1) * width
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self._attention_parameters() + mlps + norms

    def num_parameters(self) -> int:
        return self._count(self.num_local_experts)

    def num_active_parameters(self) -> int:
        """Parameters that work on one token: all but the routed experts that it was not sent to."""
        return self._count(self.num_experts_per_tok)

    def cache_bytes(self, num_tokens: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
        """Bytes of the key/value cache of one sequence of so many tokens.

        Layers that see every token hold all of them, chunked layers those of the last token's chunk. Memory is taken in
        blocks of `CACHE_BLOCK` tokens.

        Args:
            dtype: the model's.
            cache_dtype: of the layers that see every token: "auto", which is the model's, another float, or a key of
                `CACHE_BITS`: then keys and values of a token and head have a scale. Chunked layers keep the model's.

        Raises:
            ValueError: an unknown dtype.
        """
        return sum(self.layer_cache_bytes(i, num_tokens, dtype, cache_dtype) for i in range(self.num_hidden_layers))

    def peak_cache_bytes(self, num_tokens: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
        """The most bytes of that cache on the way there: chunked layers have held a whole chunk, if one was filled."""
        layers = range(self.num_hidden_layers)
        filled = [min(num_tokens, self.window(i) or num_tokens) for i in layers]
        return sum(self.layer_cache_bytes(i, filled[i], dtype, cache_dtype) for i in layers)

    def layer_cache_bytes(self, layer: int, num_tokens: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
        """Bytes of one layer's share of `cache_bytes`."""
        blocks = -(-self.visible_tokens(layer, num_tokens) // CACHE_BLOCK)
        return blocks * CACHE_BLOCK * self.cache_bytes_of_a_token(layer, dtype, cache_dtype)

    def cache_bytes_of_a_token(self, layer: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
        """Bytes of the keys and values of one token in one layer."""
        held = dtype if cache_dtype == "auto" or self.window(layer) else cache_dtype
        if held in CACHE_BITS:
            head = self.head_dim * CACHE_BITS[held] // 8 + CACHE_SCALE_BYTES
        elif held in DTYPE_BYTES:
            head = self.head_dim * DTYPE_BYTES[held]
        else:
            raise ValueError(f"cache_dtype={held!r} is not known; choose 'auto', 'bfloat16', {', '.join(CACHE_BITS)}")
        return 2 * self.num_key_value_heads * head

    def visible_tokens(self, layer: int, num_tokens: int) -> int:
        """How many tokens the last of so many sees in a layer, itself included."""
        window = self.window(layer)
        return num_tokens if window is None or not num_tokens else (num_tokens - 1) % window + 1


@dataclass(frozen=True)
class Llama4Config:
    """A whole model: decoder, vision tower (None for text-only models), and the tokens that stand for images."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    boi_token_index: int = 200080
    eoi_token_index: int = 200081
    image_token_index: int = 200092
    """Id of `<|patch|>`, whose embeddings image features replace."""
    dtype: str = "bfloat16"
    """The dtype that the checkpoint was saved in."""
    quantization_config: Mapping[str, Any] | None = None
    note: str = ""
    """What a reader of `llama4 info` must know, e.g. which numbers of a preset are guessed."""

    def num_parameters(self) -> int:
        """All parameters, without allocating any."""
        if self.vision is None:
            return self.text.num_parameters()
        projector = self.vision.vision_output_dim * self.text.hidden_size
        return self.text.num_parameters() + self.vision.num_parameters() + projector

    def num_active_parameters(self) -> int:
        """Parameters that work on one token of text (this is the "17B" of Scout and Maverick); the vision tower is not
        among them."""
        return self.text.num_active_parameters()

    # -- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_directory(cls, directory: str | Path) -> Llama4Config:
        """Read `config.json` and, for the number of tiles, the image processor's configuration beside it.

        Raises:
            ConfigError: no such file, not JSON, or a configuration that is not of a Llama 4 model.
        """
        directory = Path(directory)
        config = cls.from_dict(_read_json(directory / CONFIG_FILE))
        if config.vision is None:
            return config
        for name in IMAGE_CONFIG_FILES:
            if (directory / name).is_file():
                content = _read_json(directory / name)
                content = content.get("image_processor", content)
                names = {"max_patches": "max_tiles", "image_mean": "image_mean", "image_std": "image_std"}
                found = {names[key]: _freeze(content[key]) for key in names if content.get(key) is not None}
                if found:
                    vision = dataclasses.replace(config.vision, **found)
                    return dataclasses.replace(config, vision=vision)
        return config

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Llama4Config:
        """Build from the content of Hugging Face's `config.json`, of a multimodal or of a text-only model."""
        model_type = content.get("model_type", "llama4")
        if model_type not in ("llama4", "llama4_text"):
            raise ConfigError(f"model_type {model_type!r} is not Llama 4; this library runs 'llama4' and 'llama4_text'")
        try:
            return cls._from_dict(content, model_type)
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"the configuration has a value of the wrong kind, or lacks one: {error}") from error

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any], model_type: str) -> Llama4Config:
        text_only = model_type == "llama4_text" or "text_config" not in content
        text = dict(content if text_only else content["text_config"])
        vision = None if text_only else content.get("vision_config")
        dtype = content.get("dtype") or content.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
        extra = {
            key: content[key] for key in ("boi_token_index", "eoi_token_index", "image_token_index") if key in content
        }
        if content.get("tie_word_embeddings"):
            text["tie_word_embeddings"] = True
        return cls(
            text=_text_config(text),
            vision=_vision_config(vision) if vision is not None else None,
            dtype=str(dtype or "bfloat16"),
            quantization_config=content.get("quantization_config"),
            **extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of Hugging Face's `config.json`, which transformers reads back as the same model."""
        text = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self.text).items()}
        scaling, theta = text.pop("rope_scaling"), text.pop("rope_theta")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        text["rope_parameters"] = rope | (scaling if isinstance(scaling, dict) else {})
        text |= {"model_type": "llama4_text", "hidden_act": "silu", "dtype": self.dtype}
        if self.vision is None:
            content: dict[str, Any] = {**text, "architectures": ["Llama4ForCausalLM"]}
        else:
            vision = dataclasses.asdict(self.vision)
            theta = vision.pop("rope_theta")
            for name in ("max_tiles", "image_mean", "image_std"):
                del vision[name]
            vision["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
            vision |= {"model_type": "llama4_vision_model", "hidden_act": "gelu", "dtype": self.dtype}
            content = {
                "architectures": ["Llama4ForConditionalGeneration"],
                "model_type": "llama4",
                "boi_token_index": self.boi_token_index,
                "eoi_token_index": self.eoi_token_index,
                "image_token_index": self.image_token_index,
                "tie_word_embeddings": self.text.tie_word_embeddings,
                "dtype": self.dtype,
                "text_config": text,
                "vision_config": vision,
            }
        if self.quantization_config is not None:
            content["quantization_config"] = dict(self.quantization_config)
        return content

    def preprocessor_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, for transformers' Llama4ImageProcessor."""
        assert self.vision is not None
        side = self.vision.image_size
        return {
            "image_processor_type": "Llama4ImageProcessorFast",
            "processor_class": "Llama4Processor",
            "size": {"height": side, "width": side},
            "max_patches": self.vision.max_tiles,
            "resize_to_max_canvas": False,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": list(self.vision.image_mean),
            "image_std": list(self.vision.image_std),
        }


def _read_json(path: Path) -> dict[str, Any]:
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


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _known_fields(cls: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: _freeze(value) for key, value in content.items() if key in names}


def _text_config(content: Mapping[str, Any]) -> TextConfig:
    fields = _known_fields(TextConfig, content)
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    fields["rope_theta"] = float(rope.get("rope_theta", content.get("rope_theta", 500000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = _known_fields(RopeScaling, rope) | {"rope_type": kind}
    fields["rope_scaling"] = None if kind == "default" else RopeScaling(**scaling)
    eos = fields.get("eos_token_id")
    if not isinstance(eos, tuple):
        fields["eos_token_id"] = () if eos is None else (eos,)
    if "head_dim" in fields and fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if content.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {content['hidden_act']!r} is not supported; Llama 4's experts use 'silu'")
    return TextConfig(**fields)


def _vision_config(content: Mapping[str, Any]) -> VisionConfig:
    fields = _known_fields(VisionConfig, content)
    if content.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"hidden_act {content['hidden_act']!r} is not supported; Llama 4's vision tower uses 'gelu'")
    rope = content.get("rope_parameters") or {}
    fields["rope_theta"] = float(rope.get("rope_theta", content.get("rope_theta", 10000.0)))
    try:
        return VisionConfig(**fields)
    except ValueError as error:
        raise ConfigError(str(error)) from error


# -- presets -------------------------------------------------------------------------------------------------------


def scout() -> Llama4Config:
    """Llama 4 Scout 17B-16E: 109B parameters, 17B active, a window of 10M tokens."""
    return Llama4Config(text=TextConfig(rope_scaling=RopeScaling()))


def maverick() -> Llama4Config:
    """Llama 4 Maverick 17B-128E: 400B parameters, 17B active, a window of 1M tokens."""
    text = TextConfig(
        num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False, max_position_embeddings=1048576
    )
    return Llama4Config(text=text)


def guard4() -> Llama4Config:
    """Llama Guard 4: Scout's shape without routed experts, RoPE and full attention on every layer."""
    text = TextConfig(
        intermediate_size_mlp=8192,
        num_local_experts=0,
        moe_layers=(),
        no_rope_layers=(1,) * 48,
        attention_chunk_size=None,
        attn_temperature_tuning=False,
        rope_scaling=RopeScaling(factor=8.0),
        max_position_embeddings=131072,
    )
    return Llama4Config(
        text=text, note="12B parameters; RoPE scaling follows the released configuration as far as it is known."
    )


def behemoth() -> Llama4Config:
    """A model of the announced, unreleased Behemoth's size: 16 experts, about 2T parameters, 288B active."""
    text = TextConfig(
        hidden_size=16384,
        intermediate_size=26368,
        num_hidden_layers=88,
        num_attention_heads=128,
        num_key_value_heads=16,
        rope_scaling=RopeScaling(),
        max_position_embeddings=1048576,
    )
    note = (
        "Behemoth was announced with 16 experts, about 2T parameters and 288B active, and not released. Layers, "
        "widths, heads and window are guessed so that those three numbers come out."
    )
    return Llama4Config(text=text, note=note)


def tiny() -> Llama4Config:
    """The embedded model: every part of Llama 4 at a width that two CPU cores can train from nothing."""
    first = 896
    text = TextConfig(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1048576,
        num_local_experts=8,
        attention_chunk_size=512,
        floor_scale=512,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=512),
        bos_token_id=first,
        eos_token_id=(first + 1, first + 7, first + 8),
        pad_token_id=first + 18,
    )
    vision = VisionConfig(
        hidden_size=160,
        num_hidden_layers=6,
        num_attention_heads=5,
        intermediate_size=640,
        vision_output_dim=256,
        projector_input_dim=256,
        projector_output_dim=256,
        image_size=112,
        max_tiles=4,
    )
    return Llama4Config(
        text=text,
        vision=vision,
        boi_token_index=first + 80,
        eoi_token_index=first + 81,
        image_token_index=first + 92,
    )


PRESETS = {"scout": scout, "maverick": maverick, "guard4": guard4, "behemoth": behemoth, "tiny": tiny}
