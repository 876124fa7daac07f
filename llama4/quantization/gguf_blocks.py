"""The formats of GGUF that are computed as they lie: each row of a matrix is cut into blocks, and a block holds its
scales and its quantized values one after the other, in bytes. A file's tensor is the weight's only part, unchanged.

CPU kernels read them so (`kernels/cpp/gguf_blocks.h`).

What a block is: ggml's ggml-common.h; what its values mean: `dequantize_row_*` in ggml-quants.c.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.ops import quantized
from llama4.quantization.fp4 import E2M1
from llama4.quantization.weight import QuantizedWeight, Shape, TensorSpec, WeightFormat, in_blocks


@dataclass(frozen=True)
class GgufBlocks(WeightFormat):
    """Blocks of `block` weights in `nbytes` bytes."""

    parts = ("weight",)
    has_rows = True
    has_int8_products = True
    block: ClassVar[int] = 32
    nbytes: ClassVar[int]

    group_size: int = 32

    def __str__(self) -> str:
        return f"{self.kind.upper()}, a scale per {self.group_size} weights"

    def check(self, shape: Shape) -> None:
        if shape[-1] % self.block:
            raise Llama4Error(f"its blocks of {self.block} do not fill its {shape[-1]} inputs")

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        *rows, inputs = shape
        return {self.parts[0]: TensorSpec((*rows, inputs // self.block * self.nbytes), torch.uint8)}

    def weights_in(self, part: str, spec: TensorSpec) -> int:
        return spec.nbytes // self.nbytes * self.block

    def stack(self, weight: QuantizedWeight) -> quantized.Parts | None:
        return self.parts_of(weight, weight.part(self.parts[0]), None)

    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        return self.decode(weight.part(self.parts[0], expert))

    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        blocks = weight.part(self.parts[0], expert)

        def readable() -> Tensor:
            dtype = torch.promote_types(x_NI.dtype, torch.bfloat16)  # float16 would overflow
            return in_blocks(lambda rows: self.decode(blocks[rows]), len(blocks), x_NI.to(dtype)).to(x_NI.dtype)

        return quantized.linear(x_NI, self.parts_of(weight, blocks, None), readable=readable)

    def rows_of(self, weight: QuantizedWeight, expert: int | None, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        blocks = weight.part(self.parts[0], expert)
        return lambda rows: self.decode(blocks[rows]).to(dtype)

    def rows(self, weight: QuantizedWeight, ids: Tensor) -> Tensor:
        return self.decode(weight.part(self.parts[0])[ids])

    def decode(self, stored: Tensor) -> Tensor:
        """Rows as they are stored [..., bytes] -> their weights [..., I], in float32."""
        values = self._decode(stored.unflatten(-1, (-1, self.nbytes)))
        return values.reshape(*stored.shape[:-1], -1)

    @abstractmethod
    def _decode(self, blocks: Tensor) -> Tensor:
        """Blocks [..., nbytes] -> their weights in order, in the last dimensions, in float32."""


@dataclass(frozen=True)
class Q8_0(GgufBlocks):  # noqa: N801 (ggml's names)
    """A scale and 32 values from -128 to 127."""

    kind = "q8_0"
    bits = 8
    nbytes = 34

    def _decode(self, blocks: Tensor) -> Tensor:
        return _halves(blocks, 0) * blocks[..., 2:].view(torch.int8)


@dataclass(frozen=True)
class Q4_0(GgufBlocks):  # noqa: N801
    """A scale and 32 values from -8 to 7; the low halves of bytes come first."""

    kind = "q4_0"
    int8_activations = True
    bits = 4
    nbytes = 18

    def _decode(self, blocks: Tensor) -> Tensor:
        return _halves(blocks, 0) * (nibbles(blocks[..., 2:]).view(torch.int8) - 8)


@dataclass(frozen=True)
class Q4_1(GgufBlocks):  # noqa: N801
    """A scale, a minimum and 32 values from 0 to 15."""

    kind = "q4_1"
    int8_activations = True
    bits = 4
    nbytes = 20

    def _decode(self, blocks: Tensor) -> Tensor:
        return _halves(blocks, 0) * nibbles(blocks[..., 4:]) + _halves(blocks, 2)


@dataclass(frozen=True)
class Q5_0(GgufBlocks):  # noqa: N801
    """A scale and 32 values from -16 to 15, the highest bits of which are apart."""

    kind = "q5_0"
    int8_activations = True
    bits = 5
    nbytes = 22

    def _decode(self, blocks: Tensor) -> Tensor:
        values = nibbles(blocks[..., 6:]) | _bits(blocks[..., 2:6]) << 4
        return _halves(blocks, 0) * (values.view(torch.int8) - 16)


@dataclass(frozen=True)
class Q5_1(GgufBlocks):  # noqa: N801
    """A scale, a minimum and 32 values from 0 to 31, the highest bits of which are apart."""

    kind = "q5_1"
    int8_activations = True
    bits = 5
    nbytes = 24

    def _decode(self, blocks: Tensor) -> Tensor:
        values = nibbles(blocks[..., 8:]) | _bits(blocks[..., 4:8]) << 4
        return _halves(blocks, 0) * values + _halves(blocks, 2)


@dataclass(frozen=True)
class Q4_K(GgufBlocks):  # noqa: N801
    """Eight groups of 32 values from 0 to 15, with scales and minima of six bits, which have a scale each."""

    kind = "q4_k"
    int8_activations = True
    bits = 4
    block = 256
    nbytes = 144

    def _decode(self, blocks: Tensor) -> Tensor:
        return _scaled(blocks, nibbles(blocks[..., 16:].unflatten(-1, (4, 32))))


@dataclass(frozen=True)
class Q5_K(GgufBlocks):  # noqa: N801
    """As Q4_K, with values from 0 to 31; bit i of the 32 bytes before them is the highest of group i."""

    kind = "q5_k"
    int8_activations = True
    int8_head = False
    bits = 5
    block = 256
    nbytes = 176

    def _decode(self, blocks: Tensor) -> Tensor:
        low = nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
        high = blocks[..., None, 16:48] >> _shifts(8, 1, blocks.device)[:, None] & 1
        return _scaled(blocks, low | high << 4)


@dataclass(frozen=True)
class Q6_K(GgufBlocks):  # noqa: N801
    """Sixteen groups of 16 values from -32 to 31, with scales of eight bits, which have a scale."""

    kind = "q6_k"
    int8_activations = True
    int8_head = False
    bits = 6
    block = 256
    nbytes = 210
    group_size: int = 16

    def _decode(self, blocks: Tensor) -> Tensor:
        low = nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
        high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> _shifts(4, 2, blocks.device)[:, None] & 3
        values = low | high.flatten(-2) << 4
        scales = _halves(blocks, 208) * blocks[..., 192:208].view(torch.int8)
        return scales[..., None] * (values.view(torch.int8) - 32).flatten(-2).unflatten(-1, (16, 16))


@dataclass(frozen=True)
class Iq4Nl(GgufBlocks):
    """A scale and 32 of sixteen values that are closer to each other around zero."""

    kind = "iq4_nl"
    int8_activations = True
    bits = 4
    nbytes = 18

    VALUES: ClassVar[tuple[int, ...]] = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

    def _decode(self, blocks: Tensor) -> Tensor:
        return _halves(blocks, 0) * _look_up(self.VALUES, nibbles(blocks[..., 2:]))


@dataclass(frozen=True)
class GgufMxfp4(GgufBlocks):
    """A power of two and 32 values in e2m1. `Mxfp4` has the same numbers in another order."""

    kind = "gguf_mxfp4"
    int8_activations = True
    bits = 4
    nbytes = 17

    VALUES: ClassVar[tuple[float, ...]] = tuple(2 * value for value in (*E2M1, *(-value for value in E2M1)))

    def __str__(self) -> str:
        return f"MXFP4, a scale per {self.group_size} weights"

    def _decode(self, blocks: Tensor) -> Tensor:
        exponents = blocks[..., :1].int()
        # 2^(e - 128) and values twice as large, so that none overflows; 2^-128 and 2^-127 are not normal numbers.
        powers = torch.where(exponents < 2, 1 << 21 << exponents.clamp(max=1), exponents - 1 << 23).view(torch.float32)
        return powers * _look_up(self.VALUES, nibbles(blocks[..., 1:]))


def _halves(blocks: Tensor, at: int) -> Tensor:
    """A number in float16 of each block, [..., 1], in float32."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def nibbles(stored: Tensor) -> Tensor:
    """Four bits of each byte, the low halves of all bytes first: [..., n] -> [..., 2n]."""
    return torch.cat((stored & 15, stored >> 4), dim=-1)


def _bits(stored: Tensor) -> Tensor:
    """Every bit, the lowest of the first byte first: [..., n] -> [..., 8n]."""
    return (stored[..., None] >> _shifts(8, 1, stored.device) & 1).flatten(-2)


@cache
def _shifts(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, dtype=torch.uint8, device=device)


def _look_up(values: tuple[float, ...], indices: Tensor) -> Tensor:
    return _table(values, indices.device).index_select(0, indices.flatten().int()).view(indices.shape)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _scaled(blocks: Tensor, values: Tensor) -> Tensor:
    """Values of eight groups with their scales and minima, which have six bits each: of groups 0 to 3 the low six of
    bytes 4 to 7 and 8 to 11; of groups 4 to 7 the halves of bytes 12 to 15, and the two highest bits of those eight."""
    scales, minima, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((scales & 63, rest & 15 | scales >> 6 << 4), dim=-1)
    minima = torch.cat((minima & 63, rest >> 4 | minima >> 6 << 4), dim=-1)
    scales, minima = _halves(blocks, 0) * scales, _halves(blocks, 2) * minima
    return scales[..., None] * values.reshape(*scales.shape, 32) - minima[..., None]


GGUF_FORMATS: dict[str, GgufBlocks] = {
    "Q8_0": Q8_0(),
    "Q4_0": Q4_0(),
    "Q4_1": Q4_1(),
    "Q5_0": Q5_0(),
    "Q5_1": Q5_1(),
    "Q4_K": Q4_K(),
    "Q5_K": Q5_K(),
    "Q6_K": Q6_K(),
    "IQ4_NL": Iq4Nl(),
    "MXFP4": GgufMxfp4(),
}
"""By ggml's name of the type."""
