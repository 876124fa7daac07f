"""Int8: a signed byte per weight, a scale per output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4.ops import quantized
from llama4.ops.precision import not_zero
from llama4.quantization.weight import ROWS, QuantizedWeight, Shape, TensorSpec, WeightFormat, in_blocks


@dataclass(frozen=True)
class Int8(WeightFormat):
    """A signed byte per weight, a scale per output; inputs are not rounded, unless that is asked for."""

    kind = "int8"
    bits = 8
    has_int8_products = True
    rows_on_gpu = 16 * ROWS
    compressed_name = "int-quantized"

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec(shape, torch.int8),
            "weight_scale": TensorSpec((*shape[:-1], 1), torch.bfloat16),
        }

    def _quantize_rows(self, weight_OI: Tensor) -> dict[str, Tensor]:
        wide = weight_OI.float()
        scale = not_zero((wide.abs().amax(-1, keepdim=True) / 127).to(weight_OI.dtype))
        values = (wide / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        return {"weight": values, "weight_scale": scale}

    def to_compressed(self) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
        return {"weights": weights | {"dynamic": False}, "input_activations": None}

    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        scale = weight.part("weight_scale", expert)
        return weight.part("weight", expert).to(scale.dtype) * scale

    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        values, scale = weight.part("weight", expert), weight.part("weight_scale", expert)

        def readable() -> Tensor:
            dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
            sums = in_blocks(lambda rows: values[rows].to(dtype), len(values), x_NI.to(dtype))
            return (sums * scale.mT).to(x_NI.dtype)

        return quantized.linear(x_NI, self.parts_of(weight, values, scale), readable=readable)

    def rows_of(self, weight: QuantizedWeight, expert: int | None, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        values, scale = weight.part("weight", expert), weight.part("weight_scale", expert)
        wide = torch.promote_types(dtype, scale.dtype)

        def some(rows: slice) -> Tensor:
            own, scales = values[rows], scale[rows]
            return quantized.dequantized(
                "int8", own, scales, dtype, readable=lambda: (own.to(wide) * scales.to(wide)).to(dtype)
            )

        return some
