"""Checkpoints of NVIDIA's Model Optimizer: FP8 with a scale per matrix, and FP4.

A Linear is `q_proj.weight` with `q_proj.weight_scale` and, in NVFP4, `q_proj.weight_scale_2`; the experts of a layer
are `experts.gate_up_proj` with `experts.gate_up_proj_weight_scale` and so on, in x out. Scales of inputs are not
used: inputs of FP8 are rounded with a scale per token, those of FP4 are not rounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama4.config.typed import section
from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.ops.fp8 import E4M3
from llama4.quantization.fp4 import Fp4, Mxfp4, Nvfp4
from llama4.quantization.fp8 import Fp8
from llama4.quantization.weight import Shape, WeightFormat
from llama4.reading import read_json
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.quant_method import QuantMethod, without_cache_scales
from llama4.weights.source import Source

CONFIG_FILE = "hf_quant_config.json"
"""Where it describes itself, if config.json does not."""
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8")
_SCALE = re.compile(r".*[._](weight_scale|weight_scale_2|input_scale)")


class ModelOpt(QuantMethod):
    """Read only: what is written is in the compressed-tensors format."""

    name = "modelopt"

    def check(self, content: Mapping[str, Any]) -> None:
        layers = section(content, "quantized_layers", "ModelOpt's configuration")
        found = [section(layers, name, "quantized_layers").get("quant_algo") for name in layers]
        found = found or [content.get("quant_algo")]
        algorithms = {str(algorithm).upper() for algorithm in found if algorithm is not None}  # None: the cache alone
        if unknown := sorted(algorithms - {*_ALGORITHMS}):
            raise CheckpointError(
                f"the checkpoint is quantized by ModelOpt as {', '.join(unknown)} (quant_algo in config.json or "
                f"{CONFIG_FILE}), which this library does not run; take one in {', '.join(_ALGORITHMS)}, or in bf16"
            )

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        """Which weights are quantized, and how, the tensors say."""
        source = without_cache_scales(source)
        tensors: dict[str, str | Computed] = {}
        plan: dict[str, WeightFormat] = {}
        for name in source.names():
            if _SCALE.fullmatch(name):
                continue
            if source.spec(name).dtype not in (E4M3, torch.uint8):
                tensors[name] = name
                continue
            module = name.removesuffix(".weight")
            plan[name], parts = _Matrices(source, name, f"{module}{'_' if module == name else '.'}weight_scale").read()
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        return ComputedSource(source, tensors, plan)


def read_config(directory: Path) -> dict[str, Any] | None:
    """The `quantization_config` that stands beside config.json; None if none does.

    Raises:
        ConfigError: it is not JSON, or not an object.
    """
    if not (directory / CONFIG_FILE).is_file():
        return None
    return {"quant_method": ModelOpt.name, **section(read_json(directory / CONFIG_FILE), "quantization", CONFIG_FILE)}


class _Matrices:
    """A quantized matrix, or those of a layer's experts, with its scales.

    Args:
        source: a checkpoint.
        values: name of the quantized values there.
        scale: name of their scales; `scale`_2 is that of a second one.

    Raises:
        CheckpointError: there are no scales.
    """

    def __init__(self, source: Source, values: str, scale: str) -> None:
        if scale not in (present := source.names()):
            raise CheckpointError(
                "of what ModelOpt quantized a scale is missing; fetch it again", [source.origin(scale).key]
            )
        self._source, self._values, self._scale = source, values, scale
        self._second = f"{scale}_2" if f"{scale}_2" in present else None
        self._is_stack = len(source.spec(values).shape) == 3

    def read(self) -> tuple[WeightFormat, dict[str, str | Computed]]:
        """The format, and its parts.

        Raises:
            CheckpointError: scales that do not fit the values.
        """
        spec, scale = self._source.spec(self._values), self._source.spec(self._scale)
        if spec.dtype == E4M3:
            values = self._transposed(self._values, self._is_stack)
            return Fp8(), {"weight": values, "weight_scale": self._per_output(self._scale, self._shape(values))}
        is_in_out = self._is_stack and spec.shape[1] != scale.shape[1]
        values, scales = self._transposed(self._values, is_in_out), self._transposed(self._scale, is_in_out)
        *rows, half = self._shape(values)
        format: Fp4 = Mxfp4() if self._second is None else Nvfp4()
        wanted = format.part_specs((*rows, 2 * half))["weight_scale"]
        if (found := self._shape(scales)) != wanted.shape or scale.dtype != wanted.dtype:
            raise self._mismatch(self._scale, found, wanted.shape)
        parts = {"weight_packed": values, "weight_scale": scales}
        if self._second is not None:
            divisor = self._per_output(self._second, (*rows, half), is_per_matrix=True)
            parts["weight_global_scale"] = replace(divisor, compute=lambda parts: 1 / divisor.compute(parts))
        return format, parts

    def _transposed(self, name: str, is_in_out: bool) -> str | Computed:
        """A tensor of experts, out x in."""
        if not is_in_out:
            return name
        (E, inputs, outputs), dtype = self._source.spec(name)
        return Computed({"in_out": name}, (E, outputs, inputs), dtype, lambda parts: parts["in_out"].mT)

    def _shape(self, tensor: str | Computed) -> Shape:
        return self._source.spec(tensor).shape if isinstance(tensor, str) else tensor.shape

    def _per_output(self, name: str, shape: Shape, *, is_per_matrix: bool = False) -> Computed:
        """A scale of all experts, of each expert or of each output, for every output of matrices of this shape."""
        found, outputs = self._source.spec(name).shape, (*shape[:-1], 1)
        count, experts = math.prod(found), shape[0] if self._is_stack else 1
        if count not in (1, experts) and (is_per_matrix or count != math.prod(outputs)):
            raise self._mismatch(name, found, (experts,) if is_per_matrix else outputs)
        rows = (experts if count >= experts else 1, -1, 1) if self._is_stack else (-1, 1)
        scales = {"scale": name}
        return Computed(scales, outputs, torch.float32, lambda parts: parts["scale"].reshape(rows).expand(outputs))

    def _mismatch(self, name: str, found: Shape, wanted: Shape) -> CheckpointError:
        key = self._source.origin(name).key
        return CheckpointError(
            "a scale is not of the weights beside it; fetch the checkpoint again", mismatched=[(key, found, wanted)]
        )
