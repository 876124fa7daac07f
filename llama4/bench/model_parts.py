"""The parts of the decoder that a profile lists, with their FLOP and bytes. A part is a module's name without its
layer's number: "self_attn.q_proj"."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn

from llama4.analysis.costs import stored_bytes
from llama4.api import Llama4
from llama4.bench import roofline
from llama4.families.names import HEAD
from llama4.quantization.modules import QuantizedExperts
from llama4.quantization.weight import QuantizedWeight


def part_of(name: str) -> str:
    """Of a module's name: "self_attn.q_proj", "feed_forward.experts", "layer" for a whole layer, "model" at the top."""
    name = re.sub(r"^language_model(\.model)?\.?", "", name)
    name = re.sub(r"^layers\.\d+\.?", "layer.", name).rstrip(".")
    return name.removeprefix("layer.") or "model"


def flops_by_part(llm: Llama4, tokens: int) -> dict[str, float]:
    """FLOP of a prompt of `tokens`."""
    text, found = llm.config.text, defaultdict[str, float](float)
    for name, shape in roofline.matrices(text).items():
        part = part_of(name.removesuffix(".weight"))
        if len(shape) == 3:
            found[part.rpartition(".")[0]] += 2 * tokens * text.num_experts_per_tok * shape[1] * shape[2]
        else:
            found[part] += 2 * (1 if name == HEAD else tokens) * shape[0] * shape[1]
    found["self_attn"] = roofline.attention_flops(text, range(tokens))
    return found


def bytes_by_part(llm: Llama4, position: int) -> dict[str, float]:
    """Bytes that a decoding step of one row reads."""
    text, dtype, found = llm.config.text, llm.model.dtype, defaultdict[str, float](float)
    plan = plan_of(llm.model)
    for name, shape in roofline.matrices(text).items():
        part, size = part_of(name.removesuffix(".weight")), stored_bytes(shape, plan.get(name), dtype.itemsize)
        if len(shape) == 3:
            found[part.rpartition(".")[0]] += size * text.num_experts_per_tok / shape[0]
        else:
            found[part] += size
    keys = sum(roofline.keys_seen(text, layer, [position]) for layer in range(text.num_hidden_layers))
    found["self_attn"] = 2 * text.num_key_value_heads * text.head_dim * dtype.itemsize * keys
    return found


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Parameter of the unquantized model -> its format, where it is quantized."""
    owners = {name for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}
    return {
        name if name.rpartition(".")[0] in owners else f"{name}.weight": module.format
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
    }
