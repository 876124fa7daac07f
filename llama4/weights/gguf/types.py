"""In which type each tensor of a file is written: the mixtures of llama.cpp. Source: src/llama-quant.cpp."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llama4.config import TextConfig
from llama4.gguf import TYPES
from llama4.quantization.weight import Shape

_LAYER = re.compile(r"blk\.(\d+)\.")
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Where 256 does not divide a row."""


@dataclass(frozen=True)
class FileType:
    """What `llama4 convert --type` may be.

    Attributes:
        number: `general.file_type`.
        type: ggml's name of the type of most matrices.
    """

    number: int
    type: str


FILE_TYPES = {
    "f32": FileType(0, "F32"),
    "f16": FileType(1, "F16"),
    "bf16": FileType(32, "BF16"),
    "q8_0": FileType(7, "Q8_0"),
    "q4_0": FileType(2, "Q4_0"),
    "q4_k_m": FileType(15, "Q4_K"),
    "mxfp4": FileType(38, "MXFP4"),
}


def type_of(name: str, shape: Shape, file_type: FileType, text: TextConfig) -> str:
    """ggml's name of the type of a tensor. Vectors and routers are in F32, rows that no block divides in F16."""
    if len(shape) < 2 or "ffn_gate_inp" in name or name.startswith("v.position_embd"):
        return "F32"
    kind = _mixed(name, len(shape) > 2, file_type.type, text)
    if shape[-1] % TYPES[kind].block:
        kind = _FALLBACK.get(kind, "F16")
    return kind if shape[-1] % TYPES[kind].block == 0 else "F16"


def _mixed(name: str, is_stack: bool, kind: str, text: TextConfig) -> str:
    """What matters more than its size has more bits: the head, and in Q4_K_M values and what goes out of feed-forward
    layers, in a half of the layers. MXFP4 is for experts, in a model that has them."""
    if TYPES[kind].block == 1 or kind == "Q8_0":
        return kind
    if name == ("token_embd.weight" if text.tie_word_embeddings else "output.weight"):
        return "Q8_0" if kind == "MXFP4" else "Q6_K"
    if kind == "MXFP4":
        has_experts = text.num_local_experts > 0
        return kind if (is_stack if has_experts else name.startswith("blk.")) else "Q8_0"
    if kind != "Q4_K" or (match := _LAYER.match(name)) is None:
        return kind
    layer, layers = int(match[1]), text.num_hidden_layers
    has_more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    is_value = "attn_v." in name
    if has_more and (is_value or "ffn_down" in name):
        return "Q6_K"
    is_70b = text.num_local_experts == 0 and layers == 80 and text.num_attention_heads != text.num_key_value_heads
    return "Q5_K" if is_value and is_70b else kind
