"""Fp4: e2m1 weights, two in a byte. NVFP4 has a scale in e4m3 for sixteen of them and one in float32 for each output,
MXFP4 a power of two for thirty-two (OCP Microscaling Formats, v1.0)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.ops import quantized
from llama4.ops.fp8 import E4M3
from llama4.quantization.fp8 import from_fp8
from llama4.quantization.weight import QuantizedWeight, Shape, TensorSpec, WeightFormat, in_blocks

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The number that each quantized value stands for; with its highest bit set, the negative."""


@dataclass(frozen=True)
class Fp4(WeightFormat):
    """e2m1 per weight, the first of two in the lower half of a byte; inputs are not rounded. With the scale of its
    group a weight has at most six significant bits: in bfloat16, in which matrices are dequantized, none is rounded."""

    bits = 4
    parts: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    strategy: ClassVar[str]
    """What compressed-tensors calls its scales."""

    group_size: int = 0

    def check(self, shape: Shape) -> None:
        if shape[-1] % self.group_size:
            raise Llama4Error(f"its groups of {self.group_size} do not fill its {shape[-1]} inputs")

    @classmethod
    def from_compressed(cls, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Self | None:
        found = weights.get("type"), weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
        return cls() if found == ("float", 4, cls.strategy, cls.group_size) else None

    def to_compressed(self) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
        scales = {"strategy": self.strategy, "group_size": self.group_size, "scale_dtype": str(self.scale_dtype)}
        return {"weights": weights | scales, "input_activations": None}

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype:
        """Of the scales of groups."""

    @abstractmethod
    def decode(self, scale: Tensor) -> Tensor:
        """Bytes that are scales -> bfloat16."""

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        *rows, inputs = shape
        return {
            "weight_packed": TensorSpec((*rows, inputs // 2), torch.uint8),
            "weight_scale": TensorSpec((*rows, inputs // self.group_size), self.scale_dtype),
        }

    def stack(self, weight: QuantizedWeight) -> quantized.Parts | None:
        return None

    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        return self._rows(weight, slice(None), expert)

    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
        sums = in_blocks(lambda rows: self._rows(weight, rows, expert), weight.shape[-2], x_NI.to(dtype))
        return sums.to(x_NI.dtype)

    def _rows(self, weight: QuantizedWeight, rows: slice, expert: int | None) -> Tensor:
        """Some rows of W, of one expert or of all, with the scales of groups. Four values are looked up at once, and
        scales are repeated first: both much faster than one by one."""
        packed = weight.part("weight_packed", expert)[..., rows, :].contiguous()
        scale = self.decode(weight.part("weight_scale", expert)[..., rows, :])
        fours = packed.view(torch.int16).flatten().int().bitwise_and_(0xFFFF)
        values = _values(packed.device).index_select(0, fours).view(torch.bfloat16)
        scales = scale.repeat_interleave(self.group_size, dim=-1)
        return values.view(scales.shape).mul_(scales)


@dataclass(frozen=True)
class Mxfp4(Fp4):
    """With a power of two per 32 weights."""

    kind = "mxfp4"
    strategy = "group"
    compressed_name = "mxfp4-pack-quantized"

    group_size: int = 32

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8

    def decode(self, scale: Tensor) -> Tensor:
        return _powers(scale.device).index_select(0, scale.flatten().int()).view(scale.shape)


@dataclass(frozen=True)
class Nvfp4(Fp4):
    """With a scale in e4m3 per 16 weights; `weight_global_scale`, one per output, divides."""

    kind = "nvfp4"
    parts = ("weight_packed", "weight_scale", "weight_global_scale")
    per_matrix = ("weight_global_scale",)
    strategy = "tensor_group"
    compressed_name = "nvfp4-pack-quantized"

    group_size: int = 16

    @property
    def scale_dtype(self) -> torch.dtype:
        return E4M3

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        divisor = TensorSpec((*shape[:-1], 1), torch.float32)
        return super().part_specs(shape) | {"weight_global_scale": divisor}

    def decode(self, scale: Tensor) -> Tensor:
        return from_fp8(scale)

    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        return super().dequantize(weight, expert) / weight.part("weight_global_scale", expert)

    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        divisor_O1 = weight.part("weight_global_scale", expert)
        dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)
        return (super().product(weight, x_NI.to(dtype), expert) / divisor_O1.mT).to(x_NI.dtype)


@lru_cache
def _values(device: torch.device) -> Tensor:
    """Two bytes -> their four values in bfloat16, as one int64."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16, device=device)
    return torch.cartesian_prod(*[values] * 4).flip(-1).contiguous().view(torch.int64).flatten()


@lru_cache
def _powers(device: torch.device) -> Tensor:
    """e8m0 in bfloat16: 2^-127 to 2^127, and NaN."""
    powers = torch.arange(-127.0, 129.0, device=device).exp2()
    powers[255] = torch.nan
    return powers.to(torch.bfloat16)
