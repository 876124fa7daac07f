"""MXFP4 as transformers writes it for gpt-oss: `gate_up_proj_blocks` [E, O, G, 16], bytes of two values, and
`gate_up_proj_scales` [E, O, G], powers of two; of a Linear the same without E."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.quantization.fp4 import Mxfp4
from llama4.quantization.weight import WeightFormat
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.quant_method import QuantMethod
from llama4.weights.source import Source

_BLOCKS, _SCALES = "_blocks", "_scales"


class TransformersMxfp4(QuantMethod):
    """Read only: what is written is in the compressed-tensors format."""

    name = "mxfp4"

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        tensors: dict[str, str | Computed] = {}
        plan: dict[str, WeightFormat] = {}
        present = set(source.names())
        missing = list[str]()
        for name in source.names():
            weight = name.removesuffix(_BLOCKS)
            if weight == name:
                if not name.endswith(_SCALES):
                    tensors[name] = name
                elif f"{name.removesuffix(_SCALES)}{_BLOCKS}" not in present:
                    missing.append(source.origin(f"{name.removesuffix(_SCALES)}{_BLOCKS}").key)
                continue
            if weight + _SCALES not in present:
                missing.append(source.origin(weight + _SCALES).key)
                continue
            (*rows, groups, half), dtype = source.spec(name)
            module = weight.removesuffix(".weight")
            plan[weight] = Mxfp4(2 * half)
            tensors[f"{module}.weight_packed"] = Computed(
                {"blocks": name}, (*rows, groups * half), dtype, lambda parts: parts["blocks"]
            )
            tensors[f"{module}.weight_scale"] = weight + _SCALES
        if missing:
            raise CheckpointError("blocks have no scales, or scales no blocks; fetch the checkpoint again", missing)
        return ComputedSource(source, tensors, plan)
