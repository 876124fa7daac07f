"""e4m3: weights with a scale per output, inputs with a scale per token."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from llama4.kernels.triton import launch
from llama4.ops import quantized
from llama4.quantization.schemes import Format
from llama4.quantization.weight import PackedWeight, in_blocks, not_zero

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


class Fp8Weight(PackedWeight):
    """e4m3 per weight, a scale per output; the inputs are rounded to e4m3 with a scale per token. Both, per group of
    inputs, if the format has groups.

    The weights are held as bytes: torch cannot pickle e4m3.
    """

    weight: nn.Parameter

    @classmethod
    def part_shapes(cls, format: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups = shape[-1] // format.group_size if format.group_size else 1
        return {"weight": (shape, E4M3), "weight_scale": ((*shape[:-1], groups), torch.bfloat16)}

    @classmethod
    def quantize_rows(cls, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        codes, scale = to_fp8(weight_OI, weight_OI.dtype)
        return {"weight": codes, "weight_scale": scale}

    def checkpoint_layout(self, part: str) -> Tensor:
        return super().checkpoint_layout(part).view(E4M3) if part == "weight" else super().checkpoint_layout(part)

    def dequantize(self, expert: int | None = None) -> Tensor:
        scale = self._of(self.weight_scale, expert)
        groups = self._of(self.weight, expert).view(E4M3).to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
        return (groups * scale[..., None]).flatten(-2)

    def on_gpu(self, x_RI: Tensor) -> bool:
        return self.format.group_size is None and super().on_gpu(x_RI)

    def grouped(self, x_RI: Tensor, counts_E: Tensor | None = None, expert: int | None = None) -> Tensor:
        codes, scale = self._of(self.weight, expert), self._of(self.weight_scale, expert)
        x_codes, x_scale = to_fp8(x_RI, torch.float32)
        if counts_E is not None and len(x_RI) > launch.MAX_GEMV_ROWS and torch_multiplies(x_RI, codes, grouped=True):
            return torch._scaled_grouped_mm(
                x_codes,
                codes.view(E4M3).mT,
                x_scale.squeeze(1),
                scale.squeeze(2).float(),
                offs=counts_E.cumsum(0).to(torch.int32),
                out_dtype=x_RI.dtype,
            )
        scales = {"scales": scale, "x_scales_R": x_scale.squeeze(1)}
        return launch.product("fp8", x_codes.view(torch.uint8), codes, counts_E=counts_E, dtype=x_RI.dtype, **scales)

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        codes, scale = self._of(self.weight, expert), self._of(self.weight_scale, expert)
        if self.on_gpu(x_NI) and (len(x_NI) <= launch.MAX_GEMV_ROWS or not torch_multiplies(x_NI, codes)):
            return self.grouped(x_NI, expert=expert)
        if scale.shape[1] == 1:
            return _product(x_NI, codes, scale)
        groups = zip(
            x_NI.chunk(scale.shape[1], -1), codes.chunk(scale.shape[1], -1), scale.split(1, dim=-1), strict=True
        )
        return torch.stack([_product(*group).float() for group in groups]).sum(0).to(x_NI.dtype)


def _product(x_NI: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x W^T, where each row of x and of W has one scale."""
    if not x_NI.shape[0]:
        return x_NI.new_zeros(0, codes.shape[0])
    if not quantized.unsupported_reason("fp8", x_NI, codes, scale):
        return quantized.linear("fp8", x_NI, codes, scale)
    x_codes, x_scale = to_fp8(x_NI, torch.float32)
    if torch_multiplies(x_NI, codes):
        scale_b = scale.mT.float().contiguous()
        return torch._scaled_mm(x_codes, codes.view(E4M3).mT, scale_a=x_scale, scale_b=scale_b, out_dtype=x_NI.dtype)
    dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
    sums = in_blocks(lambda rows: from_fp8(codes[rows]).to(dtype), codes.shape[0], x_codes.to(dtype))
    return (sums * x_scale * scale.mT).to(x_NI.dtype)


def to_fp8(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """e4m3 codes and scales [..., 1], so that the largest of each row becomes 448, the largest of e4m3."""
    wide = x.float()
    scale = not_zero(wide.abs().amax(-1, keepdim=True) / LARGEST).to(scale_dtype)
    return (wide / scale.float()).clamp_(-LARGEST, LARGEST).to(E4M3), scale


def from_fp8(codes: Tensor) -> Tensor:
    """e4m3, as bytes, in bfloat16, which holds all of it. Moving the bits is ten times as fast on a CPU as torch's
    cast: the exponent is then too small by the difference of the biases, 127 - 7."""
    wide = codes.view(torch.uint8).to(torch.int16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 4).view(torch.bfloat16) * 2.0**120


def torch_multiplies(x_NI: Tensor, codes: Tensor, *, grouped: bool = False) -> bool:
    """Whether torch multiplies e4m3 there, with a scale per row and per output: by one matrix, or by those of a group.
    It gives bfloat16, and wants sixteens."""
    return (
        x_NI.dtype == torch.bfloat16
        and x_NI.shape[1] % 16 == codes.shape[-2] % 16 == 0
        and has_fp8_matmul(x_NI.device, grouped)
    )


@lru_cache
def has_fp8_matmul(device: torch.device, grouped: bool = False) -> bool:
    """Whether a device does so. A CPU can, a hundred times slower than bfloat16."""
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
