"""A signed byte per weight, a scale per output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.quantization.packed import PackedWeight, in_blocks, positive
from llama4.quantization.schemes import Format

FEW = 8
"""Tokens up to which the CPU's kernel, which reads bytes and not bfloat16, is the faster way."""


class Int8Weight(PackedWeight):
    """A signed byte per weight, a scale per output."""

    weight: nn.Parameter

    @classmethod
    def part_shapes(cls, format: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": (shape, torch.int8), "weight_scale": ((*shape[:-1], 1), torch.bfloat16)}

    @classmethod
    def quantize_rows(cls, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        wide = weight_OI.float()
        scale = positive(wide.abs().amax(-1, keepdim=True) / 127).to(weight_OI.dtype)
        codes = (wide / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, expert: int | None = None) -> Tensor:
        scale = self._of(self.weight_scale, expert)
        return self._of(self.weight, expert).to(scale.dtype) * scale

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        weight, scale = self._of(self.weight, expert), self._of(self.weight_scale, expert)
        if x_NI.device.type == "cpu" and len(x_NI) <= FEW and x_NI.dtype != torch.float64:
            out: Tensor = torch._weight_int8pack_mm(x_NI.contiguous(), weight, scale.squeeze(-1).to(x_NI.dtype))
            return out
        dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
        sums = in_blocks(lambda rows: weight[rows].to(dtype), len(weight), x_NI.to(dtype))
        return (sums * scale.mT).to(x_NI.dtype)
