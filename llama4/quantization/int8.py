"""A signed byte per weight, a scale per output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.ops import quantized
from llama4.quantization.schemes import Format
from llama4.quantization.weight import PackedWeight, in_blocks, not_zero


class Int8Weight(PackedWeight):
    """A signed byte per weight, a scale per output."""

    weight: nn.Parameter

    @classmethod
    def part_shapes(cls, format: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": (shape, torch.int8), "weight_scale": ((*shape[:-1], 1), torch.bfloat16)}

    @classmethod
    def quantize_rows(cls, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        wide = weight_OI.float()
        scale = not_zero(wide.abs().amax(-1, keepdim=True) / 127).to(weight_OI.dtype)
        codes = (wide / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, expert: int | None = None) -> Tensor:
        scale = self._of(self.weight_scale, expert)
        return self._of(self.weight, expert).to(scale.dtype) * scale

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        if self.on_gpu(x_NI):
            return self.grouped(x_NI, expert=expert)
        weight, scale = self._of(self.weight, expert), self._of(self.weight_scale, expert)
        if not quantized.unsupported_reason("int8", x_NI, weight, scale):
            return quantized.linear("int8", x_NI, weight, scale)
        dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
        sums = in_blocks(lambda rows: weight[rows].to(dtype), len(weight), x_NI.to(dtype))
        return (sums * scale.mT).to(x_NI.dtype)
