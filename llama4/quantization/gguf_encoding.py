"""Rows of numbers -> the blocks of GGUF's formats, rounded as ggml rounds.

Source: `quantize_row_*_ref` in ggml-quants.c. What the blocks mean: gguf_blocks.py.

Shapes: groups are [..., G, g], g numbers that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llama4.quantization.gguf_blocks import GgufMxfp4

_TINY = 1e-15
"""Below this the numbers of a group are zeros."""


def _q8_0(rows: Tensor) -> Tensor:
    groups = _groups(rows, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    scaled = groups * _ratio(1.0, scale)
    values = torch.where(scaled < 0, -((-scaled + 0.5).floor()), (scaled + 0.5).floor())
    return torch.cat((_half(scale), values.to(torch.int8).view(torch.uint8)), dim=-1).flatten(-2)


def _symmetric(rows: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales, as bytes, and values from 0 to 2 top - 1, of which top means 0: the largest number becomes 0."""
    groups = _groups(rows, 32)
    scale = _largest(groups) / -top
    values = (groups * _ratio(1.0, scale) + (top + 0.5)).to(torch.uint8).clamp(max=2 * top - 1)
    return _half(scale), values


def _q4_0(rows: Tensor) -> Tensor:
    scale, values = _symmetric(rows, 8)
    return torch.cat((scale, _nibbles(values)), dim=-1).flatten(-2)


def _q5_0(rows: Tensor) -> Tensor:
    scale, values = _symmetric(rows, 16)
    return torch.cat((scale, _bits(values >> 4), _nibbles(values & 15)), dim=-1).flatten(-2)


def _q5_1(rows: Tensor) -> Tensor:
    groups = _groups(rows, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 31
    values = ((groups - low) * _ratio(1.0, scale) + 0.5).to(torch.uint8)
    return torch.cat((_half(scale), _half(low), _bits(values >> 4), _nibbles(values & 15)), dim=-1).flatten(-2)


def _mxfp4(rows: Tensor) -> Tensor:
    groups = _groups(rows, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    exponents = torch.where(largest > 0, largest.log2().floor() + 125, 0).clamp(0, 255).to(torch.uint8)
    steps = torch.where(exponents < 2, 1 << 21 << exponents.int().clamp(max=1), exponents.int() - 1 << 23)
    wanted = groups / steps.view(torch.float32)
    sizes = torch.tensor(GgufMxfp4.VALUES[:8])
    nearest = torch.bucketize(wanted.abs(), (sizes[1:] + sizes[:-1]) / 2).to(torch.uint8)
    best = torch.where((wanted < 0) & (nearest > 0), nearest + 8, nearest)
    return torch.cat((exponents, _nibbles(best)), dim=-1).flatten(-2)


def _q4_k(rows: Tensor) -> Tensor:
    head, values = _scaled(rows, 15, -1.0, 20)
    packed = values.unflatten(-2, (4, 2))
    return torch.cat((head, (packed[..., 0, :] | packed[..., 1, :] << 4).flatten(-2)), dim=-1).flatten(-2)


def _q5_k(rows: Tensor) -> Tensor:
    head, values = _scaled(rows, 31, -0.5, 15)
    low, high = (values & 15).unflatten(-2, (4, 2)), (values >> 4).mT
    packed = low[..., 0, :] | low[..., 1, :] << 4
    return torch.cat((head, _bits(high).flatten(-2), packed.flatten(-2)), dim=-1).flatten(-2)


def _scaled(rows: Tensor, top: int, first: float, steps: int) -> tuple[Tensor, Tensor]:
    """Of blocks of eight groups of 32 the scales and minima, as 16 bytes, and the values from 0 to top.

    The scale and the minimum of a group are those of the least squared error, which weighs more for large numbers,
    among as many ranges, which begin at the best minimum so far: each gives values, to which both are fitted. Source:
    `make_qkx2_quants`.
    """
    groups = _groups(rows, 32).unflatten(-2, (-1, 8))
    weights = groups.square().mean(-1, keepdim=True).sqrt() + groups.abs()
    sum_w, sum_x = _sum(weights), _sum(weights * groups)
    minimum, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True)
    scale = (high - minimum) / top

    def rounded(target: float) -> Tensor:
        return (_ratio(target, high - minimum) * (groups - minimum)).round_().clamp_(0, top)

    def error_of(values: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        return _sum((scale * values + minimum - groups).square_().mul_(weights))

    error = error_of(rounded(top), scale, minimum)
    for i in range(steps + 1):
        values = rounded(top + first + 0.1 * i)
        weighted = weights * values
        sum_l, sum_l2, sum_xl = _sum(weighted), _sum(weighted * values), _sum(weighted * groups)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fitted = (sum_w * sum_xl - sum_x * sum_l) / determinant
        shift = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        fitted, shift = torch.where(shift > 0, sum_xl / sum_l2, fitted), shift.clamp(max=0)
        found = error_of(values, fitted, shift)
        better = (determinant > 0) & (found < error)
        scale, minimum, error = (
            torch.where(better, new, old) for new, old in ((fitted, scale), (shift, minimum), (found, error))
        )
    scale, minimum = scale.squeeze(-1), -minimum.squeeze(-1)
    heads, sixths = [], []
    for each in (scale, minimum):
        largest = each.amax(-1, keepdim=True).clamp(min=0)
        heads.append(_half(largest / 63))
        sixths.append((_ratio(63.0, largest) * each).round().clamp(0, 63).to(torch.uint8))
    steps_of = [head.view(torch.float16).float() * sixth for head, sixth in zip(heads, sixths, strict=True)]
    step, offset = (each[..., None] for each in steps_of)
    values = _ratio(groups + offset, step).round_().clamp_(0, top).to(torch.uint8)
    return torch.cat((*heads, _twelve(*sixths)), dim=-1), values


def _twelve(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits in twelve bytes: see `gguf_blocks._scaled`."""
    (first, rest), (first_minima, rest_minima) = scales.chunk(2, -1), minima.chunk(2, -1)
    high, high_minima = rest >> 4 << 6, rest_minima >> 4 << 6
    return torch.cat((first | high, first_minima | high_minima, rest & 15 | (rest_minima & 15) << 4), dim=-1)


def _q6_k(rows: Tensor) -> Tensor:
    """Source: `make_qx_quants`: of 19 ranges of a group the one whose error, which weighs as much as the square of a
    number, is least."""
    groups = _groups(rows, 16).unflatten(-2, (-1, 16))
    largest = _largest(groups)
    weights = groups.square()
    scale, best = torch.zeros_like(largest), None
    for i in (0, *range(-9, 0), *range(1, 10)):
        values = (_ratio(-(32 + 0.1 * i), largest) * groups).round_().clamp_(-32, 31)
        weighted = weights * values
        sum_lx, sum_l2 = _sum(weighted * groups), _sum(weighted * values)
        fitted = _ratio(sum_lx, sum_l2)
        found = fitted * sum_lx
        better = found > best if best is not None else torch.ones_like(found, dtype=torch.bool)
        scale, best = (
            torch.where(better, fitted, scale),
            torch.where(better, found, best) if best is not None else found,
        )
    scale = torch.where(largest.abs() < _TINY, 0, scale).squeeze(-1)
    top = _largest(scale)
    inverse = _ratio(-128.0, top)
    head = _half(_ratio(1.0, inverse))
    eighths = (inverse * scale).round().clamp(-128, 127)
    step = (head.view(torch.float16).float() * eighths)[..., None]
    values = (_ratio(groups, step).round_().clamp_(-32, 31) + 32).to(torch.uint8).flatten(-2)
    quarters = values.unflatten(-1, (2, 4, 32))
    low = (quarters[..., :2, :] & 15 | (quarters[..., 2:, :] & 15) << 4).flatten(-3)
    high = quarters[..., 0, :] >> 4
    for i in range(1, 4):
        high = high | quarters[..., i, :] >> 4 << 2 * i
    scales = eighths.to(torch.int8).view(torch.uint8)
    return torch.cat((low, high.flatten(-2), scales, head), dim=-1).flatten(-2)


def _groups(rows: Tensor, size: int) -> Tensor:
    return rows.unflatten(-1, (-1, size))


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


def _largest(groups: Tensor) -> Tensor:
    """Of each group the number that is farthest from zero, [..., 1]."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def _ratio(value: Tensor | float, by: Tensor) -> Tensor:
    """A quotient, 0 where it is of 0."""
    return torch.where(by != 0, value / by, 0)


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).view(torch.uint8)


def _nibbles(values: Tensor) -> Tensor:
    """Two of four bits in a byte, the first half of all in the low halves of bytes: [..., 2n] -> [..., n]."""
    low, high = values.chunk(2, dim=-1)
    return low | high << 4


def _bits(values: Tensor) -> Tensor:
    """Eight in a byte, the first lowest: [..., 8n] -> [..., n]."""
    places = torch.arange(8, dtype=torch.uint8)
    return (values.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows.to(dtype).contiguous().view(torch.uint8)


ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "F32": _as(torch.float32),
    "F16": _as(torch.float16),
    "BF16": _as(torch.bfloat16),
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}
"""ggml's name of a type -> what makes its bytes [..., bytes] of rows [..., I] in float32."""
