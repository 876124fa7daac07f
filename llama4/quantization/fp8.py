"""Fp8: e4m3 weights with a scale per output, and inputs rounded to e4m3 with a scale per token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4.ops import quantized
from llama4.ops.fp8 import E4M3, scaled_linear, to_fp8
from llama4.quantization.weight import QuantizedWeight, Shape, TensorSpec, WeightFormat, in_blocks


@dataclass(frozen=True)
class Fp8(WeightFormat):
    """e4m3 per weight, a scale per output; inputs are rounded to e4m3 with a scale per token. With groups both have a
    scale per group of inputs, as in Meta's checkpoints of several ranks."""

    kind = "fp8"
    bits = 8
    rounds_inputs = True
    float32_scales_on_gpu = True
    compressed_name = "float-quantized"

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        groups = shape[-1] // self.group_size if self.group_size else 1
        return {"weight": TensorSpec(shape, E4M3), "weight_scale": TensorSpec((*shape[:-1], groups), torch.bfloat16)}

    @property
    def is_written(self) -> bool:
        return self.group_size is None

    def _quantize_rows(self, weight_OI: Tensor) -> dict[str, Tensor]:
        values, scale = to_fp8(weight_OI, weight_OI.dtype)
        return {"weight": values, "weight_scale": scale}

    def to_compressed(self) -> dict[str, Any]:
        weights = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size,
            "dynamic": False,
        }
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        if self.group_size:
            inputs |= {"strategy": "group", "group_size": self.group_size}
        return {"weights": weights, "input_activations": inputs}

    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        scale = weight.part("weight_scale", expert)
        groups = weight.part("weight", expert).view(E4M3).to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
        return (groups * scale[..., None]).flatten(-2)

    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        values, scale = weight.part("weight", expert), weight.part("weight_scale", expert)
        G = scale.shape[1]
        if G == 1:
            parts = quantized.Parts(self.kind, values, scale, weight.shape[-1])
            return quantized.linear(x_NI, parts, readable=lambda: _product(x_NI, values, scale))
        groups = zip(x_NI.chunk(G, -1), values.chunk(G, -1), scale.split(1, dim=-1), strict=True)
        return functools.reduce(torch.Tensor.add_, (_product(*group).float() for group in groups)).to(x_NI.dtype)

    def rows_of(self, weight: QuantizedWeight, expert: int | None, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        values, scale = weight.part("weight", expert), weight.part("weight_scale", expert)
        wide = torch.promote_types(dtype, scale.dtype)

        def some(rows: slice) -> Tensor:
            groups = from_fp8(values[rows]).to(wide).unflatten(-1, (scale.shape[-1], -1))
            return (groups * scale[rows, :, None].to(wide)).flatten(-2).to(dtype)

        return some


def _product(x_NI: Tensor, values_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """x W^T, where each row of x and of W has one scale."""
    if not x_NI.shape[0]:
        return x_NI.new_zeros(0, values_OI.shape[0])

    def readable() -> Tensor:
        x_values, x_scale = to_fp8(x_NI, torch.float32)
        dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
        sums = in_blocks(lambda rows: from_fp8(values_OI[rows]).to(dtype), values_OI.shape[0], x_values.to(dtype))
        return (sums * x_scale * scale_O1.mT).to(x_NI.dtype)

    return scaled_linear(x_NI, values_OI, scale_O1, readable=readable)


def from_fp8(values: Tensor) -> Tensor:
    """e4m3, as bytes, in bfloat16, which represents every value of it. Shifting the bits is ten times as fast on a CPU
    as torch's cast; the exponent is then too small by the difference of the biases, 127 - 7."""
    wide = values.view(torch.uint8).to(torch.int16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 4).view(torch.bfloat16) * 2.0**120
