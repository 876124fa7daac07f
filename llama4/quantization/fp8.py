"""Fp8: e4m3 weights with a scale per output, and inputs rounded to e4m3 with a scale per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from llama4.ops import quantized, quantized_gpu
from llama4.quantization.weight import PackedWeight, Shape, TensorSpec, WeightFormat, in_blocks, not_zero

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


@dataclass(frozen=True)
class Fp8(WeightFormat):
    """e4m3 per weight, a scale per output; inputs are rounded to e4m3 with a scale per token. With groups both have a
    scale per group of inputs, as in Meta's checkpoints of several ranks."""

    kind = "fp8"
    bits = 8
    rounds_inputs = True
    compressed_name = "float-quantized"
    compressed_about = "fp8 (per channel) with inputs quantised per token"

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        groups = shape[-1] // self.group_size if self.group_size else 1
        return {"weight": TensorSpec(shape, E4M3), "weight_scale": TensorSpec((*shape[:-1], groups), torch.bfloat16)}

    def _quantize_rows(self, weight_OI: Tensor) -> dict[str, Tensor]:
        values, scale = to_fp8(weight_OI, weight_OI.dtype)
        return {"weight": values, "weight_scale": scale}

    @classmethod
    def from_compressed(cls, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Self | None:
        if inputs is None or (inputs.get("type"), inputs.get("strategy")) != ("float", "token"):
            return None
        found = weights.get("type", "int"), weights.get("num_bits")
        if inputs.get("dynamic") is not True or found != ("float", 8):
            return None
        match weights.get("strategy"):
            case "channel":
                return cls()
            case "group":
                return cls(weights.get("group_size"))
        return None

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
        return {"weights": weights, "input_activations": inputs}

    def dequantize(self, weight: PackedWeight, expert: int | None = None) -> Tensor:
        scale = weight.part("weight_scale", expert)
        groups = weight.part("weight", expert).view(E4M3).to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
        return (groups * scale[..., None]).flatten(-2)

    def has_gpu_kernel(self, x_RI: Tensor) -> bool:
        return self.group_size is None and super().has_gpu_kernel(x_RI)

    def grouped_product(
        self, weight: PackedWeight, x_RI: Tensor, counts_E: Tensor | None = None, expert: int | None = None
    ) -> Tensor:
        values, scale = weight.part("weight", expert), weight.part("weight_scale", expert)
        x_values, x_scale = to_fp8(x_RI, torch.float32)
        if counts_E is not None and not quantized_gpu.is_gemv(x_RI) and torch_multiplies(x_RI, values, grouped=True):
            return torch._scaled_grouped_mm(
                x_values,
                values.view(E4M3).mT,
                x_scale.squeeze(1),
                scale.squeeze(2).float(),
                offs=counts_E.cumsum(0).to(torch.int32),
                out_dtype=x_RI.dtype,
            )
        x_values, x_scale = x_values.view(torch.uint8), x_scale.squeeze(1)
        return quantized_gpu.product(self.kind, x_values, values, scale, counts_E, x_scale_R=x_scale, dtype=x_RI.dtype)

    def product(self, weight: PackedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        values, scale = weight.part("weight", expert), weight.part("weight_scale", expert)
        if self.has_gpu_kernel(x_NI) and (quantized_gpu.is_gemv(x_NI) or not torch_multiplies(x_NI, values)):
            return self.grouped_product(weight, x_NI, expert=expert)
        G = scale.shape[1]
        if G == 1:
            return _product(x_NI, values, scale)
        groups = zip(x_NI.chunk(G, -1), values.chunk(G, -1), scale.split(1, dim=-1), strict=True)
        return torch.stack([_product(*group).float() for group in groups]).sum(0).to(x_NI.dtype)


def _product(x_NI: Tensor, values_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """x W^T, where each row of x and of W has one scale."""
    if not x_NI.shape[0]:
        return x_NI.new_zeros(0, values_OI.shape[0])
    if not quantized.unsupported_reason(Fp8.kind, x_NI, values_OI, scale_O1):
        return quantized.linear(Fp8.kind, x_NI, values_OI, scale_O1)
    x_values, x_scale = to_fp8(x_NI, torch.float32)
    if torch_multiplies(x_NI, values_OI):
        weight_scale, weight_IO = scale_O1.mT.float().contiguous(), values_OI.view(E4M3).mT
        return torch._scaled_mm(x_values, weight_IO, scale_a=x_scale, scale_b=weight_scale, out_dtype=x_NI.dtype)
    dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
    sums = in_blocks(lambda rows: from_fp8(values_OI[rows]).to(dtype), values_OI.shape[0], x_values.to(dtype))
    return (sums * x_scale * scale_O1.mT).to(x_NI.dtype)


def to_fp8(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """e4m3 values and scales [..., 1]: the largest of each row becomes 448, the largest of e4m3."""
    wide = x.float()
    scale = not_zero(wide.abs().amax(-1, keepdim=True) / LARGEST).to(scale_dtype)
    return (wide / scale.float()).clamp_(-LARGEST, LARGEST).to(E4M3), scale


def from_fp8(values: Tensor) -> Tensor:
    """e4m3, as bytes, in bfloat16, which represents every value of it. Shifting the bits is ten times as fast on a CPU
    as torch's cast; the exponent is then too small by the difference of the biases, 127 - 7."""
    wide = values.view(torch.uint8).to(torch.int16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 4).view(torch.bfloat16) * 2.0**120


def torch_multiplies(x_NI: Tensor, values: Tensor, *, grouped: bool = False) -> bool:
    """Whether torch multiplies e4m3 on that device, with a scale per row and per output, by one matrix or by those of
    all experts. Its result is bfloat16; sizes must be multiples of 16."""
    return (
        x_NI.dtype == torch.bfloat16
        and x_NI.shape[1] % 16 == values.shape[-2] % 16 == 0
        and has_fp8_matmul(x_NI.device, grouped)
    )


@lru_cache
def has_fp8_matmul(device: torch.device, grouped: bool = False) -> bool:
    """Whether a device multiplies e4m3 fast. A CPU can, but a hundred times slower than bfloat16."""
    if device.type == "cpu":
        return False
    one = torch.ones(16, 16, device=device).to(E4M3)
    scale = torch.ones(16, 1, device=device)
    try:
        if grouped:
            ends = torch.tensor([16], dtype=torch.int32, device=device)
            torch._scaled_grouped_mm(one, one[None].mT, scale[:, 0], scale.mT, offs=ends, out_dtype=torch.bfloat16)
        else:
            torch._scaled_mm(one, one.mT, scale_a=scale, scale_b=scale.mT.contiguous(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True
