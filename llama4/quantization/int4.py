"""Sixteen levels per weight, a scale per group of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llama4.kernels.abi import Matrix
from llama4.ops import quantized
from llama4.quantization.schemes import Format
from llama4.quantization.weight import PackedWeight, in_blocks, not_zero

SHRINKS = (1.06, 1.0, 0.94, 0.88, 0.82, 0.76)
"""Where the range of a group may end, in parts of its largest weight: clipping a few lets all others be finer."""


def quantize_groups(groups: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., g] from -8 to 7, int8, and the scales [..., 1] that, once rounded to their dtype, leave the least
    squared error: of a few ranges, each refitted to the codes it gives by least squares.

    There is one code more below zero than above, and the largest weight gets it: a scale is negative where that weight
    is positive.
    """
    groups = groups.float()
    highest, lowest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    largest = torch.where(highest > -lowest, highest, lowest)
    best_scale, best_error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        scale = not_zero((largest * (shrink / -8)).to(scale_dtype).float())
        for _ in range(2):
            codes = (groups / scale).round_().clamp_(-8, 7)
            error = (codes * scale).sub_(groups).square_().sum(-1, keepdim=True)
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
            fitted = (codes * groups).sum(-1, keepdim=True) / codes.square_().sum(-1, keepdim=True).clamp_(min=1e-9)
            scale = not_zero(fitted.to(scale_dtype).float())
    return (groups / best_scale).round_().clamp_(-8, 7).to(torch.int8), best_scale.to(scale_dtype)


def pack(codes: Tensor) -> Tensor:
    """Codes from -8 to 7 [..., I], int8 -> [..., I / 8], int32: eight of four bits each, the first lowest."""
    nibbles = (codes + 8).view(torch.uint8)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).view(torch.int8) - 8


_TOGETHER = {"weight_packed": 4, "weight_scale": 1}
"""Numbers of a row that stay together in sixteens: 32 codes; a scale."""


class Int4Weight(PackedWeight):
    """Eight weights in an int32, a scale for every 128 or 32 of a row.

    Attributes:
        interleaved16: whether parts lie as the kernels of a CPU read them; else as in a checkpoint.
    """

    weight_packed: nn.Parameter
    parts = ("weight_packed", "weight_scale")
    interleaved16 = False

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
        if not quantized.quantize_unsupported_reason(weight_OI, format.group_size):
            packed, scale = quantized.quantize_int4(weight_OI, format.group_size, SHRINKS)
            return {"weight_packed": packed, "weight_scale": scale}
        codes, scale = quantize_groups(weight_OI.unflatten(-1, (-1, format.group_size)), weight_OI.dtype)
        return {"weight_packed": pack(codes.flatten(-2)), "weight_scale": scale.squeeze(-1)}

    def for_cpu(self, part: str, values: Tensor) -> Tensor:
        assert self.format.group_size is not None
        outputs, inputs = self.shape[-2:]
        reason = quantized.interleave_unsupported_reason(outputs, inputs, self.format.group_size)
        self.interleaved16 = reason is None
        return quantized.interleaved16(values, _TOGETHER[part]) if self.interleaved16 else values

    def checkpoint_layout(self, part: str) -> Tensor:
        return self._stored(part, super().checkpoint_layout(part))

    def as_stored(self) -> None:
        for part in self.parts:
            self.register_parameter(part, nn.Parameter(self.checkpoint_layout(part), requires_grad=False))
        self.interleaved16 = False

    def matrix(self) -> Matrix | None:
        return super().matrix() if self.interleaved16 else None

    def dequantize(self, expert: int | None = None) -> Tensor:
        packed = self._stored("weight_packed", self._of(self.weight_packed, expert))
        scale = self._stored("weight_scale", self._of(self.weight_scale, expert))
        return _dequantized(packed, scale, scale.dtype)

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        if self.on_gpu(x_NI):
            return self.grouped(x_NI, expert=expert)
        packed, scale = self._of(self.weight_packed, expert), self._of(self.weight_scale, expert)
        group_size = self.format.group_size
        assert group_size is not None
        if self.interleaved16 and not quantized.unsupported_reason("int4", x_NI, packed, scale, group_size):
            return quantized.linear("int4", x_NI, packed, scale, group_size)
        dtype = torch.promote_types(x_NI.dtype, scale.dtype)

        def some(rows: slice) -> Tensor:
            codes, scales = self._stored("weight_packed", packed[rows]), self._stored("weight_scale", scale[rows])
            return _dequantized(codes, scales, dtype)

        return in_blocks(some, packed.shape[0], x_NI)

    def _stored(self, part: str, values: Tensor) -> Tensor:
        """Whole sixteens of rows of a part, as a checkpoint has them."""
        return quantized.deinterleaved16(values, _TOGETHER[part]) if self.interleaved16 else values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """In sixteens on a CPU, as stored elsewhere."""
        was_on_cpu = self.weight_packed.is_cpu
        super()._apply(fn, recurse)
        if self.interleaved16 and not self.weight_packed.is_cpu:
            self.as_stored()
        elif self.weight_packed.is_cpu and not was_on_cpu:
            for part in self.parts:
                stored = getattr(self, part).detach()
                values = self.for_cpu(part, stored).reshape(stored.shape)
                self.register_parameter(part, nn.Parameter(values, requires_grad=False))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.interleaved16:
            destination.update({prefix + part: self.checkpoint_layout(part) for part in self.parts})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.interleaved16:
            given = {part: state_dict[prefix + part] for part in self.parts if prefix + part in state_dict}
            fitting = {part: v for part, v in given.items() if v.shape == getattr(self, part).shape}
            ordered = {prefix + part: self.for_cpu(part, v).reshape(v.shape) for part, v in fitting.items()}
            state_dict = {**state_dict, **ordered}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _dequantized(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    groups = unpack(packed).unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    return (groups * scale[..., None].to(dtype)).flatten(-2)
