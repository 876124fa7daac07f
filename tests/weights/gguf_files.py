"""GGUF files, written by hand after ggml's docs/gguf.md, and models in them with the names of llama.cpp."""

from __future__ import annotations

import itertools
import string
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama4.config import Llama4Config
from llama4.gguf import GgufFile
from llama4.model.multimodal import Llama4Model
from llama4.text.vocabulary import special_token_names
from tests import small_model

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "Q5_K": 13}
TYPES |= {"Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30, "MXFP4": 39}
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Stored = tuple[str, tuple[int, ...], bytes]
"""Type, shape as torch counts, and bytes of a tensor."""


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(content: Any) -> bytes:
    """With the type of the value before it; bytes are that already."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, bool):
        return struct.pack("<I?", 7, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + text(content)
    if isinstance(content, np.ndarray):
        assert content.dtype == np.int32
        return struct.pack("<IIQ", 9, 5, len(content)) + content.tobytes()
    return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(text, content))


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored | Tensor], version: int = 3) -> Path:
    stored = {name: floats(tensor) if isinstance(tensor, Tensor) else tensor for name, tensor in tensors.items()}
    head = struct.pack("<4sIQQ", b"GGUF", version, len(stored), len(metadata))
    head += b"".join(text(key) + value(content) for key, content in metadata.items())
    offset, data = 0, []
    for name, (kind, shape, content) in stored.items():
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", TYPES[kind], offset)
        data.append(content + b"\0" * (-len(content) % 32))
        offset += len(data[-1])
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"".join(data))
    return path


def floats(tensor: Tensor) -> Stored:
    return FLOATS[tensor.dtype], tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}
BLOCKS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
OTHERS = {
    "language_model.model.embed_tokens.weight": "token_embd.weight",
    "language_model.model.norm.weight": "output_norm.weight",
    "language_model.lm_head.weight": "output.weight",
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear.weight": "v.patch_embd.weight",
    "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
    "multi_modal_projector.linear_1.weight": "mm.model.fc.weight",
    "vision_model.layernorm_pre.weight": "v.pre_ln.weight",
    "vision_model.layernorm_pre.bias": "v.pre_ln.bias",
    "vision_model.layernorm_post.weight": "v.post_ln.weight",
    "vision_model.layernorm_post.bias": "v.post_ln.bias",
}


def tensors_of(model: Llama4Model) -> dict[str, Tensor]:
    """A model's parameters as llama.cpp's converter writes them: experts out x in, gate and up apart."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name in OTHERS:
            found[OTHERS[name]] = tensor
            continue
        side, _, rest = name.partition(".model.layers.")
        layer, _, rest = rest.partition(".")
        if rest == "feed_forward.experts.gate_up_proj":
            gate, up = tensor.mT.chunk(2, dim=1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
        elif rest == "feed_forward.experts.down_proj":
            found[f"blk.{layer}.ffn_down_exps.weight"] = tensor.mT
        else:
            module, _, part = rest.rpartition(".")
            table, prefix = (NAMES, "blk") if side == "language_model" else (BLOCKS, "v.blk")
            found[f"{prefix}.{layer}.{table[module]}.{part}"] = tensor
    return found


def metadata_of(config: Llama4Config) -> dict[str, Any]:
    """Keys as llama.cpp's converter writes them, and ours for the chunk and the temperature."""
    text = config.text
    keys: dict[str, Any] = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size_mlp,
        "expert_feed_forward_length": text.intermediate_size,
        "expert_count": text.num_local_experts,
        "expert_used_count": text.num_experts_per_tok,
        "interleave_moe_layer_step": text.interleave_moe_layer_step,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": text.head_dim,
        "attention.value_length": text.head_dim,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "rope.freq_base": text.rope_theta,
        "rope.dimension_count": text.head_dim,
        "vocab_size": text.vocab_size,
        "attention.chunk_size": text.attention_chunk_size or 0,
        "attention.temperature_scale": text.attn_scale,
        "attention.temperature_floor": text.floor_scale,
    }
    return {"general.architecture": "llama4"} | {f"llama4.{key}": content for key, content in keys.items()}


def vocabulary() -> dict[str, Any]:
    """That of `small_model`: the bytes in GPT-2's alphabet, pairs of letters, and Llama 4's control tokens."""
    letters = bytes_to_unicode()
    pairs = [a + b for a, b in itertools.product(string.ascii_lowercase, repeat=2)]
    text = [*(letters[byte] for byte in range(256)), *pairs][: small_model.RANKS]
    kinds = [1] * small_model.RANKS + [3] * small_model.SPECIAL
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama4",
        "tokenizer.ggml.tokens": [*text, *special_token_names(small_model.SPECIAL)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": small_model.RANKS,
        "tokenizer.ggml.eos_token_id": small_model.RANKS + 8,
        "tokenizer.ggml.padding_token_id": small_model.RANKS + 18,
    }


def vision_metadata(config: Llama4Config) -> dict[str, Any]:
    assert config.vision is not None
    vision = config.vision
    keys: dict[str, Any] = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "block_count": vision.num_hidden_layers,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": vision.norm_eps,
        "projector.scale_factor": round(1 / vision.pixel_shuffle_ratio),
        "preproc_max_tiles": vision.max_tiles,
    }
    return {"general.architecture": "clip", "clip.projector_type": "llama4"} | {
        f"clip.vision.{key}": content for key, content in keys.items()
    }


def small(path: Path, **metadata: Any) -> Path:
    """`small_model` as one file, without its vision tower."""
    config, model = small_model.config(), small_model.model()
    tensors = {name: tensor for name, tensor in tensors_of(model).items() if not name.startswith(("v.", "mm."))}
    tensors["rope_freqs.weight"] = torch.tensor(DIVISORS)
    return write(path, metadata_of(config) | vocabulary() | metadata, tensors)


def small_mmproj(path: Path) -> Path:
    """Its vision tower."""
    tensors = tensors_of(small_model.model())
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith(("v.", "mm."))}
    return write(path, vision_metadata(small_model.config()), vision)


def split(whole: Path, directory: Path) -> list[Path]:
    """A file as three, the first with the metadata alone, as llama-gguf-split writes them."""
    file, data = GgufFile.read(whole), whole.read_bytes()
    stored = {
        name: (tensor.type.name, tensor.shape, data[tensor.offset : tensor.offset + tensor.nbytes])
        for name, tensor in file.tensors.items()
    }
    names, paths = list(stored), list[Path]()
    for i, some in enumerate(([], names[:20], names[20:])):
        metadata = {key: value for key, value in file.metadata.items() if i == 0}
        metadata |= {"split.no": i, "split.count": 3, "split.tensors.count": len(names)}
        path = directory / f"small-{i + 1:05d}-of-00003.gguf"
        paths.append(write(path, metadata, {name: stored[name] for name in some}))
    return paths


DIVISORS = [1.0, 16.0, 16.0, 16.0, 16.0, 16.0]
"""Of the rule `llama3` of `small_model`: a window of 32 tokens, in which the first pair alone turns once (2 pi)."""
