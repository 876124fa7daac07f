"""Sixteen levels per weight, a scale per group of inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from llama4.quantization.packed import ROWS, PackedWeight, in_blocks, positive
from llama4.quantization.schemes import Format

SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.70)
"""Where the range of a group may end, in parts of its largest weight: clipping a few lets all others be finer."""
LARGEST = 7.5
"""Codes are -8 to 7: what a range's end is divided by, as in compressed-tensors."""
PANEL = 64
"""Rows among which the CPU's kernel shuffles its codes; a multiple of what any processor takes."""


def quantize_groups(groups: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., g] from -8 to 7, int8, and the scales [..., 1] that, once rounded to their dtype, leave the least
    squared error: of a few ranges, each refitted to the codes it gives by least squares."""
    groups = groups.float()
    peak = groups.abs().amax(-1, keepdim=True)
    best_scale, best_error = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    for shrink in SHRINKS:
        scale = positive((peak * (shrink / LARGEST)).to(scale_dtype).float())
        for _ in range(2):
            codes = (groups / scale).round_().clamp_(-8, 7)
            error = (codes * scale).sub_(groups).square_().sum(-1, keepdim=True)
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
            fitted = (codes * groups).sum(-1, keepdim=True) / codes.square_().sum(-1, keepdim=True).clamp_(min=1e-9)
            scale = torch.where(fitted > 0, fitted, scale).to(scale_dtype).float()
    return (groups / best_scale).round_().clamp_(-8, 7).to(torch.int8), best_scale.to(scale_dtype)


def pack(codes: Tensor) -> Tensor:
    """Codes from -8 to 7 [..., I], int8 -> [..., I / 8], int32: eight of four bits each, the first lowest."""
    nibbles = (codes + 8).view(torch.uint8)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).view(torch.int8) - 8


class Int4Weight(PackedWeight):
    """Eight weights in an int32, a scale for every 128 or 32 of a row.

    On a CPU the codes are shuffled once into the order of torch's kernel, which reads them where they lie.
    """

    weight_packed: nn.Parameter
    parts = ("weight_packed", "weight_scale")

    @classmethod
    def part_shapes(cls, format: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        *rows, inputs = shape
        assert format.group_size is not None
        return {
            "weight_packed": ((*rows, inputs // 8), torch.int32),
            "weight_scale": ((*rows, inputs // format.group_size), torch.bfloat16),
        }

    @classmethod
    def quantize_rows(cls, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        assert format.group_size is not None
        codes, scale = quantize_groups(weight_OI.unflatten(-1, (-1, format.group_size)), weight_OI.dtype)
        return {"weight_packed": pack(codes.flatten(-2)), "weight_scale": scale.squeeze(-1)}

    def arrange(self, dtype: torch.dtype) -> None:
        """Into the layout of `_weight_int4pack_mm_for_cpu`: shuffled codes [.., O, I / 2] and, per group and output, a
        scale and a zero [.., G, O, 2]."""
        packed, scale = self.weight_packed, self.weight_scale
        if packed.device.type != "cpu":
            return
        self._scale_dtype = scale.dtype
        codes = torch.empty(*packed.shape[:-1], packed.shape[-1] * 4, dtype=torch.uint8)
        matrices = packed.reshape(-1, *packed.shape[-2:]), codes.view(-1, *codes.shape[-2:])
        for matrix, shuffled in zip(*matrices, strict=True):
            for rows in range(0, len(matrix), ROWS):
                unsigned = unpack(matrix[rows : rows + ROWS]).int() + 8
                shuffled[rows : rows + ROWS] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        zeros = torch.zeros_like(scale.mT, dtype=dtype)
        self.register_parameter("weight_packed", nn.Parameter(codes, requires_grad=False))
        self.register_parameter(
            "weight_scale", nn.Parameter(torch.stack([scale.mT.to(dtype), zeros], dim=-1), requires_grad=False)
        )

    @property
    def is_arranged(self) -> bool:
        return self.weight_packed.dtype == torch.uint8

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """What leaves the CPU leaves its kernel's order behind."""
        if self.is_arranged and fn(self.weight_packed.data[:0]).device.type != "cpu":
            for part, values in [(part, self.portable(part)) for part in self.parts]:
                self.register_parameter(part, nn.Parameter(values, requires_grad=False))
        return super()._apply(fn, recurse)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self._scale_dtype if self.is_arranged else super().scale_dtype

    def portable(self, part: str) -> Tensor:
        if not self.is_arranged:
            return super().portable(part)
        if part == "weight_scale":
            return self.weight_scale[..., 0].mT.to(self._scale_dtype).contiguous()
        flat = self.weight_packed.detach().reshape(-1, *self.weight_packed.shape[-2:])
        return torch.stack([pack(unshuffled(matrix)) for matrix in flat]).view(*self.shape[:-1], -1)

    def dequantize(self, expert: int | None = None) -> Tensor:
        if self.is_arranged:
            codes = unshuffled(self._of(self.weight_packed, expert))
            scale = self._of(self.weight_scale, expert)[..., 0].mT
        else:
            codes, scale = unpack(self._of(self.weight_packed, expert)), self._of(self.weight_scale, expert)
        return self._scaled(codes, scale)

    def _scaled(self, codes: Tensor, scale: Tensor) -> Tensor:
        groups = codes.unflatten(-1, (scale.shape[-1], -1)).to(scale.dtype)
        return (groups * scale[..., None]).flatten(-2)

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        packed, scale = self._of(self.weight_packed, expert), self._of(self.weight_scale, expert)
        if self.is_arranged:
            out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x_NI.contiguous(), packed, self.format.group_size, scale.to(x_NI.dtype)
            )
            return out
        return in_blocks(lambda rows: self._scaled(unpack(packed[rows]), scale[rows]), len(packed), x_NI)


def unshuffled(codes: Tensor) -> Tensor:
    """What `_convert_weight_to_int4pack_for_cpu` made, [O, I / 2], back to codes from -8 to 7, [O, I], int8."""
    panels = []
    for panel in codes.split(PANEL):
        order = shuffle_order(len(panel), panel.shape[1] * 2)
        nibbles = torch.stack([panel & 15, panel >> 4]).view(-1).view(torch.int8)
        panels.append(torch.empty_like(nibbles).scatter_(0, order, nibbles).view(len(panel), -1))
    return torch.cat(panels) - 8


@lru_cache(maxsize=8)
def shuffle_order(rows: int, inputs: int) -> Tensor:
    """Where each code of a shuffled panel came from; low nibbles first, then high ones.

    The kernel's layout depends on the processor and is written down nowhere, so it is asked: the digits of every
    place's number are shuffled one after the other.
    """
    places = torch.arange(rows * inputs, dtype=torch.int32).view(rows, inputs)
    order = torch.zeros(rows * inputs, dtype=torch.int64)
    for shift in range(0, (rows * inputs - 1).bit_length(), 4):
        digits = torch.ops.aten._convert_weight_to_int4pack_for_cpu(places >> shift & 15, 1)
        order += torch.stack([digits & 15, digits >> 4]).view(-1).long() << shift
    return order
