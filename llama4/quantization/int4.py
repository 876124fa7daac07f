"""Int4: sixteen levels per weight, a scale per group of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.ops import quantized
from llama4.ops.precision import not_zero
from llama4.quantization.weight import ROWS, QuantizedWeight, Shape, TensorSpec, WeightFormat, in_blocks

GROUP_SIZES = (32, 64, 128, 256)
"""That are read; 128 and 32 are written."""
RANGES = (1.06, 1.0, 0.94, 0.88, 0.82, 0.76)
"""Candidates for the largest representable value of a group, relative to its largest weight: clipping a few weights
makes the steps between all others smaller."""
_INTERLEAVED = {"weight_packed": 4, "weight_scale": 1}
"""Elements of a row that stay together when sixteen rows are interleaved: 32 quantized values; one scale."""


@dataclass(frozen=True)
class Int4(WeightFormat):
    """Eight weights in an int32, a scale per 32 to 256 weights of a row. The CPU kernels read sixteen rows
    interleaved."""

    kind = "int4"
    bits = 4
    parts = ("weight_packed", "weight_scale")
    has_int8_products = True
    int8_activations = True
    rows_on_gpu = 16 * ROWS
    compressed_name = "pack-quantized"

    group_size: int = 128

    @classmethod
    def for_matrices(cls, shapes: Mapping[str, Shape]) -> Self:
        """Groups of 128, or of 32 where 128 does not divide all rows: one size for the model, as engines expect."""
        for name, (*_, outputs, inputs) in shapes.items():
            if inputs % 32 or outputs % 16:
                raise Llama4Error(
                    f"{name} has {inputs} inputs and {outputs} outputs; int4 takes multiples of 32 and of 16: choose "
                    "int8 or fp8"
                )
        return cls(128 if all(shape[-1] % 128 == 0 for shape in shapes.values()) else 32)

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        *rows, inputs = shape
        return {
            "weight_packed": TensorSpec((*rows, inputs // 8), torch.int32),
            "weight_scale": TensorSpec((*rows, inputs // self.group_size), torch.bfloat16),
        }

    def _quantize_rows(self, weight_OI: Tensor) -> dict[str, Tensor]:
        def readable() -> tuple[Tensor, Tensor]:
            values, scale = quantize_groups(weight_OI.unflatten(-1, (-1, self.group_size)), weight_OI.dtype)
            return pack(values.flatten(-2)), scale.squeeze(-1)

        packed, scale = quantized.quantize_int4(weight_OI, self.group_size, RANGES, readable=readable)
        return {"weight_packed": packed, "weight_scale": scale}

    def to_compressed(self) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.group_size}
        return {"weights": weights | {"dynamic": False}, "input_activations": None}

    def has_kernel_layout(self, shape: Shape) -> bool:
        outputs, inputs = shape[-2:]
        return quantized.is_stored_interleaved(outputs, inputs, self.group_size)

    def to_kernel_layout(self, part: str, values: Tensor) -> Tensor:
        return quantized.interleaved16(values, _INTERLEAVED[part])

    def from_kernel_layout(self, part: str, values: Tensor) -> Tensor:
        return quantized.deinterleaved16(values, _INTERLEAVED[part])

    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        packed, scale = (weight.to_checkpoint_layout(part, weight.part(part, expert)) for part in self.parts)
        return _dequantize(packed, scale, scale.dtype)

    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        rows_of = self.rows_of(weight, expert, x_NI.dtype)
        readable = partial(in_blocks, rows_of, weight.shape[-2], x_NI)
        return quantized.linear(x_NI, self.kernel_parts(weight, expert), readable=readable)

    def rows_of(self, weight: QuantizedWeight, expert: int | None, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        packed, scale = weight.part("weight_packed", expert), weight.part("weight_scale", expert)

        def some(rows: slice) -> Tensor:
            values = weight.to_checkpoint_layout("weight_packed", packed[rows])
            scales = weight.to_checkpoint_layout("weight_scale", scale[rows])
            wide = torch.promote_types(dtype, scale.dtype)
            return quantized.dequantized(
                "int4", values, scales, dtype, readable=lambda: _dequantize(values, scales, wide).to(dtype)
            )

        return some


def quantize_groups(
    groups: Tensor, scale_dtype: torch.dtype, importance: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Quantized values [..., g] from -8 to 7, int8, and scales [..., 1] with the least squared error among `RANGES`,
    times the importance of each number, [..., g].

    Each candidate range gives a scale, which is then refitted to its quantized values by least squares; errors are
    those after rounding the scale to its dtype. As there is one value more below zero than above, the largest weight
    becomes -8: the scale is negative where that weight is positive. It is NaN for a group that has NaN or infinity.
    """
    groups = groups.float()
    highest, lowest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    largest = torch.where(highest > -lowest, highest, lowest)
    best_scale, best_error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for part_of_largest in RANGES:
        scale = not_zero((largest * (part_of_largest / -8)).to(scale_dtype).float())
        for _ in range(2):
            values = (groups / scale).round_().clamp_(-8, 7)
            error = (values * scale).sub_(groups).square_().mul_(importance).sum(-1, keepdim=True)
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
            weighted = values * importance
            fitted = (weighted * groups).sum(-1, keepdim=True) / weighted.mul_(values).sum(-1, keepdim=True).clamp_(
                min=1e-9
            )
            scale = not_zero(fitted.to(scale_dtype).float())
    values = (groups / best_scale).round_().clamp_(-8, 7).nan_to_num_().to(torch.int8)
    return values, (best_scale + (highest - highest) + (lowest - lowest)).to(scale_dtype)


def pack(values: Tensor) -> Tensor:
    """Quantized values from -8 to 7 [..., I], int8 -> [..., I / 8], int32: eight of four bits, the first lowest."""
    nibbles = (values + 8).view(torch.uint8)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).view(torch.int8) - 8


def _dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    groups = unpack(packed).unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    return (groups * scale[..., None].to(dtype)).flatten(-2)
