"""A model as GGUF: what llama.cpp reads, and keys of ours for what it has fixed."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama4.config import Llama4Config, RopeScaling, TextConfig
from llama4.errors import CheckpointError
from llama4.files import replaced_file
from llama4.gguf import MAGIC, TYPE_NUMBERS, TYPES
from llama4.progress import Bar, track
from llama4.quantization.gguf_blocks import GgufBlocks
from llama4.quantization.gguf_encoding import ENCODERS
from llama4.quantization.weight import Shape
from llama4.text.gguf_vocabulary import vocabulary_metadata
from llama4.text.tokenizer import Tokenizer
from llama4.weights.gguf.config import OWN, YARN_FACTOR, llama3_divisors
from llama4.weights.gguf.names import NAMES, ROPE_DIVISORS
from llama4.weights.gguf.sampling import sampling_metadata
from llama4.weights.gguf.types import FileType, type_of
from llama4.weights.side_files import SideFiles
from llama4.weights.source import Source

ALIGNMENT = 32
_WEIGHTS = 1 << 20
"""Of a matrix, which are converted at a time."""


@dataclass(frozen=True)
class _Written:
    """A tensor of the file: how it is made, in float32, as whole matrices."""

    shape: Shape
    read: Callable[[], Tensor]


def write_gguf(
    source: Source,
    config: Llama4Config,
    tokenizer: Tokenizer | None,
    path: Path,
    type_: FileType,
    side_files: SideFiles,
    *,
    progress: bool = False,
) -> None:
    """Write a model as one file, and before it its vision tower, in float32, as `mmproj-NAME` beside it.

    Raises:
        CheckpointError: weights in a format, a tokenizer, or a model, that is not written.
    """
    _check_expressible(config)
    tensors = _tensors(source)
    if config.text.tie_word_embeddings:
        tensors.pop("output.weight", None)
    metadata = _metadata(config, path.stem, type_) | sampling_metadata(side_files.generation_config)
    if tokenizer is not None:
        bos = tokenizer.bos_id if tokenizer.adds_bos else config.text.bos_token_id
        roles = {"bos": bos, "eos": tokenizer.eos_id, "padding": config.text.pad_token_id}
        vocabulary = tokenizer.path, tokenizer.model, tokenizer.added_tokens, roles, config.text.vocab_size
        metadata |= vocabulary_metadata(*vocabulary, adds_bos=tokenizer.adds_bos)
    if template := side_files.chat_templates.get("default"):
        metadata["tokenizer.chat_template"] = template
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(("v.", "mm."))}
    if (divisors := _divisors(config)) is not None:
        text[ROPE_DIVISORS] = _Written(tuple(divisors.shape), lambda: divisors)
    if config.vision is not None:
        vision = {name: tensor for name, tensor in tensors.items() if name not in text}
        _write(path.with_name(f"mmproj-{path.name}"), _vision(config), vision, dict.fromkeys(vision, "F32"), progress)
    kinds = {name: type_of(name, tensor.shape, type_, config.text) for name, tensor in text.items()}
    _write(path, metadata, text, kinds, progress)  # the last, as its name says that all is there


def differences(config: Llama4Config) -> list[str]:
    """What llama.cpp assumes, in words, that is otherwise in this model and would show within its window."""
    text, layers = config.text, range(config.text.num_hidden_layers)
    if config.family != "llama4":
        slides = text.sliding_window is not None and text.sliding_window < text.max_position_embeddings
        return [f"that tokens see all before them, not the last {text.sliding_window}"] if slides else []
    window, chunks = text.max_position_embeddings, {text.window(i) for i in layers if text.uses_rope(i)}
    own, fixed = _growth(text, window), _TEMPERATURE if _TEMPERATURE[1] <= window else None
    others = {
        "experts in every model": text.num_local_experts == 0,
        f"chunks of {_CHUNK} tokens, not {text.attention_chunk_size or 'of all'}": any(
            min(chunk or window, window) != min(_CHUNK, window) for chunk in chunks
        ),
        f"a temperature that {_growth_text(fixed)}, not one that {_growth_text(own)}": own != fixed,
        "every fourth layer without RoPE": text.no_rope_layers != tuple(int((i + 1) % 4 != 0) for i in layers),
        "norms of queries and keys unless experts are 128": text.use_qk_norm != (text.num_local_experts != 128),
        "attention without biases": text.attention_bias,
    }
    return [words for words, differs in others.items() if differs]


_CHUNK = 8192
_TEMPERATURE = 0.1, 8192
"""What llama.cpp has fixed for Llama 4; source: src/models/llama4.cpp."""


def _growth(text: TextConfig, window: int) -> tuple[float, int] | None:
    """By how much the temperature grows after how many tokens; None where it does not within the window."""
    grows = text.attn_temperature_tuning and text.attn_scale != 0 and text.floor_scale <= window
    return (text.attn_scale, text.floor_scale) if grows else None


def _growth_text(growth: tuple[float, int] | None) -> str:
    return "stays" if growth is None else f"grows by {growth[0]} from {growth[1]} tokens on"


def _check_expressible(config: Llama4Config) -> None:
    """Raises:
    CheckpointError: a model with what no key says.
    """
    text = config.text
    if text.cross_layers:
        raise CheckpointError("layers of cross-attention have no place in GGUF; convert to Hugging Face's layout")
    if config.family != "llama4":
        return
    step, layers = text.interleave_moe_layer_step, range(text.num_hidden_layers)
    experts = tuple(range(step - 1, len(layers), step)) if text.num_local_experts and step else ()
    chunked = all(text.window(i) == (text.attention_chunk_size if text.uses_rope(i) else None) for i in layers)
    if text.moe_layers != experts or not (chunked or text.sliding_window):
        raise CheckpointError(
            "GGUF has no key for which layers have experts other than every n-th, or chunks other than those with "
            "RoPE; keep the model's layout"
        )


def _tensors(source: Source) -> dict[str, _Written]:
    """The tensors of the file: experts out x in, gate and up apart."""
    plan = {name.removesuffix(".weight"): format for name, format in source.plan.items() if format is not None}
    found: dict[str, _Written] = {}

    def add(name: str, shape: Shape, read: Callable[[], Tensor]) -> None:
        key = NAMES.to_file(name)
        if key is None:
            raise CheckpointError(f"{name} has no name in GGUF; it is not written")
        found[key] = _Written(shape, read)

    for name in source.names():
        format = plan.get(name.rpartition(".")[0])
        shape, read = source.spec(name).shape, partial(source.read, name)
        if isinstance(format, GgufBlocks) and not name.endswith(".bias"):
            *rows, nbytes = shape
            add(name, (*rows, nbytes // format.nbytes * format.block), partial(_decoded, format, read))
        elif format is not None and not name.endswith(".bias"):
            raise CheckpointError(f"{name} is in {format}, of which no GGUF is made; convert the original")
        elif name.endswith("experts.gate_up_proj"):
            E, D, F2 = shape
            for i, half in enumerate(("gate", "up")):
                new = name.replace("gate_up_proj", f"{half}_proj.weight")
                add(new, (E, F2 // 2, D), partial(_half_of, read, i))
        elif name.endswith("experts.down_proj"):
            E, F, D = shape
            add(f"{name}.weight", (E, D, F), partial(_half_of, read, None))
        else:
            add(name, shape, read)
    return found


def _decoded(format: GgufBlocks, read: Callable[[], Tensor]) -> Tensor:
    return format.decode(read())


def _half_of(read: Callable[[], Tensor], half: int | None) -> Tensor:
    """A stack of experts, out x in; of gate and up side by side one."""
    whole = read()
    return (whole if half is None else whole.chunk(2, -1)[half]).mT


def _divisors(config: Llama4Config) -> Tensor | None:
    text, scaling = config.text, config.text.rope_scaling
    if scaling is None or scaling.rope_type in ("linear", "yarn"):
        return None
    if scaling.rope_type == "llama3":
        return torch.from_numpy(llama3_divisors(scaling, text.rope_theta, text.head_dim)).float()
    if scaling.short_factor and scaling.short_factor == scaling.long_factor and scaling.attention_factor == 1:
        return torch.tensor(scaling.short_factor)
    raise CheckpointError(
        f"RoPE is scaled by {scaling.rope_type!r}, which GGUF has no form for; keep the model's layout"
    )


def _metadata(config: Llama4Config, name: str, type_: FileType) -> dict[str, Any]:
    text, scaling = config.text, config.text.rope_scaling
    keys: dict[str, Any] = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size_mlp,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": text.head_dim,
        "attention.value_length": text.head_dim,
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.freq_base": float(text.rope_theta),
        "rope.dimension_count": text.head_dim,
        "vocab_size": text.vocab_size,
    }
    if scaling is not None and scaling.rope_type in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor)}
        if scaling.rope_type == "yarn":
            if not scaling.truncate:
                raise CheckpointError("GGUF has no key for yarn without truncate; keep the model's layout")
            keys |= {
                "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
                "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
                "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
                YARN_FACTOR: scaling.yarn_attention_factor / RopeScaling("yarn", scaling.factor).yarn_attention_factor,
            }
    if config.family == "llama4":
        keys |= {
            "expert_count": text.num_local_experts,
            "expert_used_count": text.num_experts_per_tok,
            "expert_feed_forward_length": text.intermediate_size,
            "interleave_moe_layer_step": text.interleave_moe_layer_step,
            OWN["chunk"]: text.attention_chunk_size or 0,
            OWN["temperature"]: float(text.attn_scale) if text.attn_temperature_tuning else 0.0,
            OWN["floor"]: text.floor_scale,
            OWN["nope"]: np.array(text.no_rope_layers, np.int32),
            OWN["qk_norm"]: text.use_qk_norm,
        }
    elif text.sliding_window is not None:
        keys[OWN["sliding"]] = text.sliding_window
    architecture = "llama4" if config.family == "llama4" else "llama"
    general = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": type_.number,
        "general.quantization_version": 2,
    }
    return general | {f"{architecture}.{key}": value for key, value in keys.items()}


def _vision(config: Llama4Config) -> dict[str, Any]:
    vision = config.vision
    assert vision is not None
    keys: dict[str, Any] = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": config.text.hidden_size,
        "block_count": vision.num_hidden_layers,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": float(vision.norm_eps),
        "projector.scale_factor": round(1 / vision.pixel_shuffle_ratio),
        "preproc_max_tiles": vision.max_tiles,
        "image_mean": np.array(vision.image_mean, np.float32),
        "image_std": np.array(vision.image_std, np.float32),
    }
    general = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 0,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "llama4",
        "clip.use_gelu": True,
    }
    return general | {f"clip.vision.{key}": value for key, value in keys.items()}


def _write(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, _Written], kinds: Mapping[str, str], progress: bool
) -> None:
    """One tensor at a time is in memory, a few rows of it in float32."""
    sizes = {
        name: math.prod(t.shape) // TYPES[kinds[name]].block * TYPES[kinds[name]].nbytes for name, t in tensors.items()
    }
    head = struct.pack("<4sIQQ", MAGIC, 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    offset = 0
    for name, tensor in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        head += struct.pack("<IQ", TYPE_NUMBERS[kinds[name]], offset)
        offset += sizes[name] + -sizes[name] % ALIGNMENT
    with replaced_file(path) as file, Bar("writing", offset, "bytes", shown=progress) as bar:
        file.write(head + b"\0" * (-len(head) % ALIGNMENT))
        for name, tensor in tensors.items():
            with bar.step(sizes[name]):
                values = tensor.read()
                rows = values.reshape(-1, values.shape[-1])
                count = max(1, _WEIGHTS // rows.shape[1])
                for at in track(range(0, len(rows), count)):
                    file.write(ENCODERS[kinds[name]](rows[at : at + count].float()).numpy().tobytes())
                file.write(b"\0" * (-sizes[name] % ALIGNMENT))


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value of metadata, its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, np.ndarray):
        number, dtype = (6, np.float32) if value.dtype.kind == "f" else (5, np.int32)
        return struct.pack("<IIQ", 9, number, len(value)) + value.astype(dtype).tobytes()
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
