"""FP8 in blocks, as transformers' FineGrainedFP8 and DeepSeek write it: `q_proj.weight` in e4m3 and, beside it,
`q_proj.weight_scale_inv`, by which each block of it is to be multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.weights.compressed_formats import Scaled
from llama4.weights.quant_method import QuantMethod
from llama4.weights.source import Source, View
from llama4.weights.stored import DecodedSource

_BLOCK = "weight_block_size"
_SCALE = ".weight_scale_inv"
_INPUTS = ".activation_scale"
"""A fixed scale of the inputs, which are rounded with one per token, or not at all."""


class FineGrainedFp8(QuantMethod):
    """Read only: blocks are dequantized; what has a scale per matrix is fp8."""

    name = "fp8"

    def check(self, content: Mapping[str, Any]) -> None:
        block = content.get(_BLOCK)
        sizes = block if isinstance(block, list) and len(block) == 2 else [block]
        if block is not None and not (len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
            raise CheckpointError(f"{_BLOCK} of quantization_config is {block!r:.80}; it must be two sizes, or null")

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        rows, columns = content.get(_BLOCK, (128, 128)) or (None, None)
        names: dict[str, str] = {}
        stored: dict[str, Scaled] = {}
        for name in source.names():
            module = name.removesuffix(_SCALE)
            if module != name:
                names[f"{module}.weight_scale"] = name
                has_powers = source.spec(name).dtype == torch.uint8
                stored[module] = Scaled("float", 8, (rows, columns), inputs=("float", "token"), has_powers=has_powers)
            elif not name.endswith(_INPUTS):
                names[name] = name
        return DecodedSource(View(source, names), stored, dtype)
