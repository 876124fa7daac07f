"""Sixteen levels at quantiles of the normal distribution, a scale per block: what bitsandbytes writes.

A matrix is cut, row after row, into blocks of 64 numbers or so. A byte holds two of them, the first in its upper half;
what a code stands for, a map of sixteen says, and every block is scaled by its largest. Those scales may be quantised
again: each to a byte, with a map of 256, in blocks of 256, about their mean.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama4.quantization.schemes import Format
from llama4.quantization.weight import PackedWeight, in_blocks

KIND = "nf4"
NESTED_BLOCK = 256
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Nf4Format(Format):
    """How a matrix is stored by bitsandbytes.

    Attributes:
        state: what bitsandbytes says of the matrix, as JSON, to be written again as it was read.
        stored: shape in the file: a Linear's is [out, in], experts are [E * in, out] or [E, in, out].
        dtype: what numbers are rounded to where they are used.
        offset: of the scales, if they are quantised again; None if not.
    """

    state: str = ""
    stored: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    offset: float | None = None

    @classmethod
    def read(cls, state: str) -> Nf4Format:
        """From what bitsandbytes says.

        Raises:
            ValueError: not what it writes, or of a kind that is not run; with the reason.
        """
        try:
            content = json.loads(state)
            kind, block, dtype = content["quant_type"], int(content["blocksize"]), str(content["dtype"])
            stored = tuple(int(size) for size in content["shape"])
            offset = float(content["nested_offset"]) if "nested_offset" in content else None
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its quant_state cannot be read ({error!r})") from error
        if kind != KIND:
            raise ValueError(f"it is quantised as {kind!r}, and only {KIND!r} is run")
        if block < 2 or block % 2 or math.prod(stored) % block or math.prod(stored) < 1:
            raise ValueError(f"its blocks of {block} do not fill its shape {list(stored)}")
        if dtype not in _DTYPES:
            raise ValueError(f"its dtype is {dtype!r}, not one of {', '.join(_DTYPES)}")
        if offset is not None and (content.get("nested_blocksize"), content.get("nested_dtype")) != (256, "float32"):
            raise ValueError(f"its scales are not quantised in blocks of 256 to float32, but as {state}")
        return cls(KIND, block, state, stored, _DTYPES[dtype], offset)

    def __str__(self) -> str:
        return f"{KIND}, a scale per {self.group_size} weights{'' if self.offset is None else ', in a byte'}"


class Nf4Weight(PackedWeight):
    """A matrix as bitsandbytes stores it; or those of all experts, which it stores in x out.

    The map, the blocks and the dtype are those of the file, so that numbers are bitsandbytes' own to the bit.
    """

    format: Nf4Format
    weight: nn.Parameter
    absmax: nn.Parameter
    quant_map: nn.Parameter
    nested_absmax: nn.Parameter
    nested_quant_map: nn.Parameter

    def __init__(self, format: Nf4Format, shape: tuple[int, ...], *, bias: bool = False) -> None:
        *experts, outputs, inputs = shape
        in_out = [(*experts, inputs, outputs), (math.prod(experts) * inputs, outputs)]
        if format.stored not in (in_out if experts else [shape]):
            wanted = " or ".join(str(list(size)) for size in (in_out if experts else [shape]))
            raise ValueError(f"it is stored as {list(format.stored)}, where the model wants {wanted}")
        assert format.group_size is not None
        if experts and outputs % format.group_size:
            raise ValueError(f"its blocks of {format.group_size} cross its rows of {outputs}")
        super().__init__(format, shape, bias=bias)

    @classmethod
    def part_shapes(cls, format: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        assert isinstance(format, Nf4Format) and format.group_size is not None
        blocks = math.prod(shape) // format.group_size
        parts = {
            "weight": ((math.prod(shape) // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.float32 if format.offset is None else torch.uint8),
            "quant_map": ((16,), torch.float32),
        }
        if format.offset is not None:
            parts["nested_absmax"] = ((-(-blocks // NESTED_BLOCK),), torch.float32)
            parts["nested_quant_map"] = ((256,), torch.float32)
        return parts

    def dequantize(self, expert: int | None = None) -> Tensor:
        return self._rows(slice(None), self._blocks(expert), self._scales(expert))

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        blocks, scales = self._blocks(expert), self._scales(expert)
        return in_blocks(lambda rows: self._rows(rows, blocks, scales), self.shape[-2], x_NI)

    def _blocks(self, expert: int | None) -> Tensor:
        """The codes of a matrix, [blocks, bytes]."""
        assert self.format.group_size is not None
        blocks = self.weight.view(-1, self.format.group_size // 2)
        return blocks if expert is None else blocks.view(self.shape[0], -1, blocks.shape[1])[expert]

    def _scales(self, expert: int | None) -> Tensor:
        """Those of its blocks, float32."""
        scales = self.absmax if expert is None else self.absmax.view(self.shape[0], -1)[expert]
        if self.format.offset is None:
            return scales
        first = (expert or 0) * len(scales)
        larger = torch.arange(first, first + len(scales), dtype=torch.int32, device=scales.device) // NESTED_BLOCK
        numbers = self.nested_quant_map.index_select(0, scales.int())  # much faster than indexing
        return numbers.mul_(self.nested_absmax.index_select(0, larger)).add_(self.format.offset)

    def _rows(self, rows: slice, blocks: Tensor, scales: Tensor) -> Tensor:
        """Some rows of W [O, I], in the dtype of the format."""
        outputs, inputs = self.shape[-2:]
        size = self.format.group_size
        assert size is not None
        begin, end, _ = rows.indices(outputs)
        if len(self.shape) == 2:
            assert begin * inputs % size == 0
            some = slice(begin * inputs // size, end * inputs // size)
            return self._numbers(blocks[some], scales[some]).view(-1, inputs)
        assert outputs % size == begin % size == 0
        some = slice(begin // size, end // size)
        blocks, scales = blocks.unflatten(0, (inputs, -1))[:, some], scales.unflatten(0, (inputs, -1))[:, some]
        return self._numbers(blocks.flatten(0, 1), scales.flatten()).view(inputs, -1).mT

    def _numbers(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """[blocks, numbers]. Both numbers of a byte are looked up at once."""
        pairs = torch.cartesian_prod(self.quant_map, self.quant_map).view(torch.int64).flatten()
        numbers = pairs.index_select(0, blocks.flatten().int()).view(torch.float32).view(len(blocks), -1)
        return numbers.mul_(scales[:, None]).to(self.format.dtype)
