"""FP8 as transformers with FBGEMM, and Meta, write it: experts stacked, in x out, with scales per output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.quantization.fp8 import Fp8
from llama4.quantization.weight import TensorSpec, WeightFormat
from llama4.weights.quant_method import QuantMethod
from llama4.weights.source import Source, View

_TRANSPOSED = (".experts.gate_up_proj.weight", ".experts.gate_up_proj.weight_scale", ".experts.down_proj.weight")
"""Parts that the model has the other way round. The scales of down_proj are [E, D, 1] in the file, too."""


class FbgemmFp8(QuantMethod):
    """Read only: what is written is in the compressed-tensors format."""

    name = "fbgemm_fp8"

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        return FbgemmSource(source)


class FbgemmSource(View):
    """Such a checkpoint as parts of packed weights. What has a scale is quantized; several scales per output are for
    that many groups of inputs. FBGEMM's upper bound for the scales of inputs, which clips large ones, is not applied.

    Raises:
        CheckpointError: weights with a scale that are not e4m3.
    """

    def __init__(self, source: Source) -> None:
        names: dict[str, str] = {}
        plan: dict[str, WeightFormat] = {}
        super().__init__(source, names, plan)
        present, wrong = set(source.names()), list[str]()
        for name in source.names():
            weight = name.removesuffix("_scale")
            if weight != name and weight in present:
                scale = f"{weight.removesuffix('.weight')}.weight_scale"
                names[scale] = name
                groups, inputs = self.spec(scale).shape[-1], source.spec(weight).shape[1]
                plan[weight] = Fp8(inputs // groups if groups > 1 else None)
            elif f"{name}_scale" in present:
                names[f"{name.removesuffix('.weight')}.weight"] = name
                if (dtype := source.spec(name).dtype) != torch.float8_e4m3fn:
                    wrong.append(f"{source.origin(name).key} ({dtype})")
            else:
                names[name] = name
        if wrong:
            raise CheckpointError(
                "weights that have scales must be float8_e4m3fn; fetch the checkpoint again", unexpected=wrong
            )

    def spec(self, name: str) -> TensorSpec:
        (*shape,), dtype = super().spec(name)
        if name.endswith(_TRANSPOSED):
            shape[1], shape[2] = shape[2], shape[1]
        return TensorSpec(tuple(shape), dtype)

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor.mT.contiguous() if name.endswith(_TRANSPOSED) else tensor

    def is_mapped(self, name: str) -> bool:
        return not name.endswith(_TRANSPOSED) and super().is_mapped(name)
