"""Meta's `params.json` <-> our configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4.config import Llama4Config, RopeScaling, TextConfig
from llama4.config.typed import read_fields, section
from llama4.errors import CheckpointError, ConfigError, Llama4Error
from llama4.reading import MAX_TOKENIZER_BYTES, read_bytes, read_json
from llama4.text.vocabulary import NUM_SPECIAL_TOKENS
from llama4.vision.config import VisionConfig

PARAMS_FILE = "params.json"
RANK_FILES = "consolidated.*.pth"


@dataclass(frozen=True)
class DecoderParams:
    """What is read of the params.json of every generation, without the objects in it. What has no default must be
    there."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    vocab_size: int = -1
    ffn_dim_multiplier: float | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_position_embeddings: int | None = None
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None


@dataclass(frozen=True)
class _Params(DecoderParams):
    """And what Llama 4 has beside."""

    ffn_exp: float | None = None
    use_qk_norm: bool = False
    rope_theta: float = 500000.0
    rope_high_freq_factor: float | None = None
    nope_layer_interval: int | None = None
    attention_chunk_size: int | None = None
    attn_temperature_tuning: bool = False
    floor_scale: int = 8192
    attn_scale: float = 0.1


@dataclass(frozen=True)
class _MoeArgs:
    """What is read of moe_args."""

    num_experts: int
    top_k: int = 1
    interleave_moe_layer_step: int = 1
    auto_scale_F: bool = True  # Meta's name
    capacity_factor: float = 1.0


@dataclass(frozen=True)
class _VisionArgs:
    """What is read of vision_args."""

    dim: int
    n_layers: int
    n_heads: int
    mlp_ratio: float
    output_dim: int
    pixel_shuffle_ratio: float


@dataclass(frozen=True)
class _Size:
    """Of pictures and patches, which are squares."""

    height: int


def read_params(directory: Path) -> Llama4Config:
    """The configuration in a directory of Meta's layout; special tokens come after the ranks of its tokenizer.model.

    Raises:
        ConfigError: a `params.json` that is damaged or of another model.
    """
    path = directory / PARAMS_FILE
    ranks = directory / "tokenizer.model"
    lines = read_bytes(ranks, MAX_TOKENIZER_BYTES).splitlines() if ranks.is_file() else None
    first = 200000 if lines is None else sum(1 for line in lines if line)
    try:
        return config_from_params(read_json(path), first)
    except (Llama4Error, ArithmeticError) as error:
        raise ConfigError(f"{path} is damaged, or not of a Llama 4 model: {error}") from error


def config_from_params(params: Mapping[str, Any], first_special: int = 200000) -> Llama4Config:
    """Build from the content of `params.json`, which some files nest in a "model".

    The window is not among Meta's fields: it is what we wrote as `max_position_embeddings`, else that of the released
    models: Scout's with scaled RoPE, Maverick's without.
    """
    params = read_object(_Params, section(params, "model", PARAMS_FILE) or params, PARAMS_FILE)
    dim, layers, heads = params["dim"], params["n_layers"], params["n_heads"]
    moe, vision = (section(params, name, PARAMS_FILE) for name in ("moe_args", "vision_args"))
    if moe:
        if params.get("ffn_exp") is None:
            raise ConfigError(f"{PARAMS_FILE} has moe_args, but no ffn_exp; fetch the file again")
        moe = read_object(_MoeArgs, moe, f"{PARAMS_FILE} (moe_args)")
        params = {**params, "moe_args": moe}
    scaled, interval = params.get("use_scaled_rope", False), params.get("nope_layer_interval")
    vocab_size = params.get("vocab_size", -1)
    rope = tuple(int(not interval or (i + 1) % interval != 0) for i in range(layers))
    text = TextConfig(
        vocab_size=vocab_size if vocab_size > 0 else first_special + NUM_SPECIAL_TOKENS,
        hidden_size=dim,
        intermediate_size=expert_width(params) if moe else dense_width(params),
        intermediate_size_mlp=dense_width(params),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_dim=dim // max(heads, 1),
        max_position_embeddings=params.get("max_position_embeddings") or (10485760 if scaled else 1048576),
        rms_norm_eps=params.get("norm_eps", 1e-5),
        num_experts_per_tok=moe.get("top_k", 1) if moe else 1,
        num_local_experts=moe["num_experts"] if moe else 0,
        interleave_moe_layer_step=moe.get("interleave_moe_layer_step", 1) if moe else 1,
        use_qk_norm=params.get("use_qk_norm", False),
        rope_theta=float(params.get("rope_theta", 500000.0)),
        rope_scaling=RopeScaling(
            factor=float(params.get("rope_scaling_factor") or 16.0),
            high_freq_factor=float(params.get("rope_high_freq_factor") or 1.0),
        )
        if scaled
        else None,
        no_rope_layers=rope,
        no_rope_layer_interval=interval or 4,
        attention_chunk_size=params.get("attention_chunk_size"),
        attn_temperature_tuning=params.get("attn_temperature_tuning", False),
        floor_scale=int(params.get("floor_scale", 8192)),
        attn_scale=params.get("attn_scale", 0.1),
        bos_token_id=first_special,
        eos_token_id=(first_special + 1, first_special + 7, first_special + 8),
        pad_token_id=first_special + 18,
    )
    return Llama4Config(
        text, _vision(vision) if vision else None, first_special + 80, first_special + 81, first_special + 92
    )


def read_object(cls: type, content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """An object, with values of the kinds that a class says. null stands for what is absent."""
    fields = read_fields(cls, {name: value for name, value in content.items() if value is not None}, place)
    if missing := [
        f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields
    ]:
        raise ConfigError(f"{place} lacks {', '.join(missing)}; fetch the file again")
    return {**{name: value for name, value in content.items() if isinstance(value, Mapping)}, **fields}


def _vision(args: Mapping[str, Any]) -> VisionConfig:
    place = f"{PARAMS_FILE} (vision_args)"
    args = read_object(_VisionArgs, args, place)
    image, patch = (
        read_object(_Size, section(args, name, place), f"{place}: {name}") for name in ("image_size", "patch_size")
    )
    width = args["output_dim"]
    return VisionConfig(
        hidden_size=args["dim"],
        num_hidden_layers=args["n_layers"],
        num_attention_heads=args["n_heads"],
        intermediate_size=int(args["dim"] * args["mlp_ratio"]),
        vision_output_dim=width,
        projector_input_dim=width,
        projector_output_dim=width,
        image_size=image["height"],
        patch_size=patch["height"],
        pixel_shuffle_ratio=args["pixel_shuffle_ratio"],
    )


def _scaled(width: int, params: Mapping[str, Any]) -> int:
    """Two thirds of a width, times the multiplier: what SwiGLU's third matrix costs, given back (Shazeer 2020)."""
    return int((params.get("ffn_dim_multiplier") or 1.0) * int(2 * width / 3))


def _rounded(width: int, params: Mapping[str, Any]) -> int:
    return width + -width % max(1, int(params.get("multiple_of", 256)))


def dense_width(params: Mapping[str, Any]) -> int:
    """Width of the MLP of a layer without experts."""
    return _rounded(_scaled(4 * params["dim"], params), params)


def expert_width(params: Mapping[str, Any]) -> int:
    """Width of an expert; `auto_scale_F` divides the dense width between the routed and the shared one."""
    moe = params["moe_args"]
    width = _scaled(int(params["ffn_exp"] * params["dim"]), params)
    if moe.get("auto_scale_F", True):
        width = int(width / (moe.get("capacity_factor", 1.0) + 1))
    return _rounded(width, params)


def params_from_config(config: Llama4Config) -> dict[str, Any]:
    """The content of `params.json`, from which `config_from_params` makes the same configuration.

    Raises:
        CheckpointError: a property of the model that Meta's format has no field for.
    """
    text, vision = config.text, config.vision
    scaling, interval = text.rope_scaling, text.no_rope_layer_interval
    has_nope = 0 in (text.no_rope_layers or ())
    params: dict[str, Any] = {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
        "norm_eps": text.rms_norm_eps,
        "attention_chunk_size": text.attention_chunk_size,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": scaling is not None,
        "nope_layer_interval": interval if has_nope else None,
        "use_qk_norm": text.use_qk_norm,
        "attn_temperature_tuning": text.attn_temperature_tuning,
        "floor_scale": text.floor_scale,
        "attn_scale": text.attn_scale,
        "max_position_embeddings": text.max_position_embeddings,
    }
    if scaling is not None:
        params |= {"rope_scaling_factor": scaling.factor, "rope_high_freq_factor": scaling.high_freq_factor}
    if text.moe_layers:
        params["moe_args"] = {
            "num_experts": text.num_local_experts,
            "capacity_factor": 1.0,
            "auto_scale_F": True,
            "top_k": text.num_experts_per_tok,
            "interleave_moe_layer_step": text.interleave_moe_layer_step,
        }
    params |= _widths(text, params)
    if vision is not None:
        params["vision_args"] = {
            "image_size": {"height": vision.image_size, "width": vision.image_size},
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "dim": vision.hidden_size,
            "n_layers": vision.num_hidden_layers,
            "n_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "output_dim": vision.vision_output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        }
    _check_expressible(config, params)
    return params


def _widths(text: TextConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """`ffn_exp`, `ffn_dim_multiplier` and `multiple_of` that give the model's widths: Meta's own values where they do,
    else some that round to them."""
    dense, expert, dim = text.intermediate_size_mlp, text.intermediate_size, text.hidden_size
    has_experts, has_dense = _kinds_of_layers(text)
    step = math.gcd(dense, expert) if has_experts and has_dense else expert if has_experts else dense
    multiplier = dense / int(8 * dim / 3) if has_dense else 1.0
    choices = [
        {"ffn_exp": 4.0, "ffn_dim_multiplier": 1.2, "multiple_of": 2048},
        {"ffn_exp": 3 * expert / multiplier / dim, "ffn_dim_multiplier": multiplier, "multiple_of": step},
    ]
    for choice in choices:
        whole = {**params, **choice}
        fits = (not has_dense or dense_width(whole) == dense, not has_experts or expert_width(whole) == expert)
        if all(fits):
            return choice
    raise CheckpointError(
        f"Meta's params.json cannot express an MLP {dense} and experts {expert} wide at hidden_size {dim}; "
        "keep Hugging Face's layout"
    )


def _kinds_of_layers(text: TextConfig) -> tuple[bool, bool]:
    """Whether there are layers with experts, and layers without."""
    with_experts = len(text.moe_layers or ())
    return with_experts > 0, with_experts < text.num_hidden_layers


def _check_expressible(config: Llama4Config, params: Mapping[str, Any]) -> None:
    """Reading back what was written must give the same model; name the fields that would not come back."""
    first = config.image_token_index - 92
    whole = config_from_params(params, first)
    ours, back = config.text, whole.text
    plain = {"layer_types", "interleave_moe_layer_step", "no_rope_layer_interval", "bos_token_id", "eos_token_id"}
    names = [name for name in TextConfig.__dataclass_fields__ if name not in plain | {"pad_token_id"}]
    has_experts, has_dense = _kinds_of_layers(ours)
    unused = {"tie_word_embeddings"}  # the head is written out
    unused |= set() if has_experts else {"intermediate_size"}
    unused |= set() if has_dense else {"intermediate_size_mlp"}
    lost = lost_fields(ours, back, [name for name in names if name not in unused])
    windows = [ours.window(i) for i in range(ours.num_hidden_layers)]
    if windows != [back.window(i) for i in range(ours.num_hidden_layers)]:
        lost += lost_fields(ours, back, ["layer_types"])
    if config.vision is not None:
        lost += lost_fields(config.vision, whole.vision, list(vars(config.vision)), "vision's ")
    check_nothing_is_lost(lost)


def lost_fields(ours: object, back: object, names: Sequence[str], of: str = "") -> list[str]:
    """In words, the fields of a configuration that were read back otherwise; of an object in it, its fields."""
    lost = []
    for name in names:
        value, read = getattr(ours, name), getattr(back, name)
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(read):
            lost += lost_fields(value, read, [field.name for field in dataclasses.fields(value)], f"{of}{name}'s ")
        elif value != read:
            is_long = isinstance(value, tuple)  # a value for each layer
            lost.append(f"{of}{name}" + ("" if is_long else f" = {value} (it would be read as {read})"))
    return lost


def check_nothing_is_lost(lost: Sequence[str]) -> None:
    """Raises:
    CheckpointError: something is, of `lost_fields`.
    """
    if lost:
        raise CheckpointError(
            f"Meta's layout cannot hold this model; its params.json has no field for {', '.join(lost)}: "
            "write Hugging Face's layout (hf) or GGUF"
        )
