"""FP8 in blocks, as transformers' FineGrainedFP8 and DeepSeek write it: `q_proj.weight` in e4m3 and, beside it,
`q_proj.weight_scale_inv`, by which each block of it is to be multiplied."""

from __future__ import annotations

import math
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
_SCALES = (".weight_scale_inv", ".weight_scale")
"""The second is vLLM's and AutoFP8's word for the same."""
_UNUSED = (".activation_scale", ".input_scale", ".q_scale", ".k_scale", ".v_scale")
"""Fixed scales of inputs, which are rounded with one per token, or not at all; and of a cache."""
_VALUES = (torch.float8_e4m3fn, torch.float8_e5m2)
_POWERS = (torch.uint8, torch.float8_e8m0fnu)


class FineGrainedFp8(QuantMethod):
    """Read only: blocks are dequantized; what has a scale per matrix is fp8."""

    name = "fp8"

    def check(self, content: Mapping[str, Any]) -> None:
        block = content.get(_BLOCK)
        sizes = block if isinstance(block, list) and len(block) == 2 else [block]
        if block is not None and not (len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
            raise CheckpointError(f"{_BLOCK} of quantization_config is {block!r:.80}; it must be two sizes, or null")

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        """Raises:
        CheckpointError: values without a scale, or with one that is no number.
        """
        names: dict[str, str] = {}
        stored: dict[str, Scaled] = {}
        wrong: list[str] = []
        for name in source.names():
            kind = next((each for each in _SCALES if name.endswith(each)), None)
            if kind is not None:
                spec, module = source.spec(name), name.removesuffix(kind)
                if not (spec.dtype.is_floating_point or spec.dtype in _POWERS):
                    wrong.append(f"{source.origin(name).key} ({spec.dtype})")
                names[f"{module}.weight_scale"] = name
                whole = (None, None) if math.prod(spec.shape) == 1 else (128, 128)  # where the size is not said
                rows, columns = content.get(_BLOCK, whole) or (None, None)
                has_powers = spec.dtype in _POWERS
                stored[module] = Scaled("float", 8, (rows, columns), inputs=("float", "token"), has_powers=has_powers)
            elif not name.endswith(_UNUSED):
                names[name] = name
        if wrong:
            raise CheckpointError("scales must be floats, or exponents; fetch the checkpoint again", unexpected=wrong)
        scaled = {f"{module}.weight" for module in stored}
        if bare := [at for name, at in names.items() if name not in scaled and source.spec(at).dtype in _VALUES]:
            raise CheckpointError(
                "values in fp8 have no weight_scale_inv; fetch the checkpoint again, or, as stacked experts are "
                "not read in this format, one in bf16 or in that of compressed-tensors",
                unexpected=(source.origin(name).key for name in bare),
            )
        return DecodedSource(View(source, names), stored, dtype)
