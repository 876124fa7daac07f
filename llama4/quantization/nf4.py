"""NF4: sixteen levels at quantiles of the normal distribution, a scale per block, as bitsandbytes writes it.

The numbers of a matrix, row after row, are cut into blocks, mostly of 64. A byte holds two quantized values, the first
in its upper half; `quant_map` has the number each of the sixteen stands for, and every block is scaled by its largest
number, `absmax`. Those scales may be quantized themselves ("nested"): a byte each, with a map of 256 numbers, in blocks
of 256, relative to their mean (Dettmers et al. 2023, "QLoRA").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.quantization.weight import QuantizedWeight, Shape, TensorSpec, WeightFormat, in_blocks
from llama4.reading import parse_json

NESTED_BLOCK = 256
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Nf4(WeightFormat):
    """How bitsandbytes stores one matrix, or those of all experts, which it stores in x out. Map, blocks and dtype are
    those of the file, so that the dequantized numbers are bitsandbytes' own, bit by bit.

    Attributes:
        group_size: numbers of a block.
        state: what bitsandbytes says of the matrix, as JSON, to be written again as it was read.
        stored: shape in the file: a Linear's is [out, in], experts are [E * in, out] or [E, in, out].
        dtype: what dequantized numbers are rounded to.
        offset: added to the scales, if they are quantized; None if they are not.
    """

    kind = "nf4"
    bits = 4
    parts = ("weight",)

    group_size: int = 64
    state: str = ""
    stored: Shape = ()
    dtype: torch.dtype = torch.bfloat16
    offset: float | None = None

    @classmethod
    def read(cls, state: str) -> Nf4:
        """From what bitsandbytes says.

        Raises:
            Llama4Error: not what it writes, or of a kind that is not run; with the reason.
        """
        try:
            content = parse_json(state.encode(), "quant_state")
            kind, block, dtype = content["quant_type"], int(content["blocksize"]), str(content["dtype"])
            stored = tuple(int(size) for size in content["shape"])
            offset = float(content["nested_offset"]) if "nested_offset" in content else None
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise Llama4Error(f"its quant_state cannot be read ({error!r})") from error
        if kind != cls.kind:
            raise Llama4Error(f"it is quantized as {kind!r}, and only {cls.kind!r} is run")
        if block < 2 or block % 2 or math.prod(stored) % block or math.prod(stored) < 1:
            raise Llama4Error(f"its blocks of {block} do not fill its shape {list(stored)}")
        if dtype not in _DTYPES:
            raise Llama4Error(f"its dtype is {dtype!r}, not one of {', '.join(_DTYPES)}")
        if offset is not None and (content.get("nested_blocksize"), content.get("nested_dtype")) != (256, "float32"):
            raise Llama4Error(f"its scales are not quantized in blocks of 256 to float32, but as {state}")
        return cls(block, state, stored, _DTYPES[dtype], offset)

    def __str__(self) -> str:
        return f"{self.kind}, a scale per {self.group_size} weights{'' if self.offset is None else ', in a byte'}"

    def check(self, shape: Shape) -> None:
        *experts, outputs, inputs = shape
        in_out = [(*experts, inputs, outputs), (math.prod(experts) * inputs, outputs)]
        if self.stored not in (in_out if experts else [shape]):
            wanted = " or ".join(str(list(size)) for size in (in_out if experts else [shape]))
            raise Llama4Error(f"it is stored as {list(self.stored)}, where the model wants {wanted}")
        if experts and outputs % self.group_size:
            raise Llama4Error(f"its blocks of {self.group_size} cross its rows of {outputs}")

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        blocks = math.prod(shape) // self.group_size
        parts = {
            "weight": TensorSpec((math.prod(shape) // 2, 1), torch.uint8),
            "absmax": TensorSpec((blocks,), torch.float32 if self.offset is None else torch.uint8),
            "quant_map": TensorSpec((16,), torch.float32),
        }
        if self.offset is not None:
            parts["nested_absmax"] = TensorSpec((-(-blocks // NESTED_BLOCK),), torch.float32)
            parts["nested_quant_map"] = TensorSpec((256,), torch.float32)
        return parts

    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        return self._rows(weight, slice(None), self._blocks(weight, expert), self._scales(weight, expert))

    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        return in_blocks(self.rows_of(weight, expert, x_NI.dtype), weight.shape[-2], x_NI)

    def rows_of(self, weight: QuantizedWeight, expert: int | None, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        blocks, scales = self._blocks(weight, expert), self._scales(weight, expert)
        return lambda rows: self._rows(weight, rows, blocks, scales).to(dtype)

    def _blocks(self, weight: QuantizedWeight, expert: int | None) -> Tensor:
        """The quantized values of a matrix, [blocks, bytes]."""
        blocks = weight.part("weight").view(-1, self.group_size // 2)
        return blocks if expert is None else blocks.view(weight.shape[0], -1, blocks.shape[1])[expert]

    def _scales(self, weight: QuantizedWeight, expert: int | None) -> Tensor:
        """Scales of its blocks, float32."""
        scales = weight.part("absmax")
        scales = scales if expert is None else scales.view(weight.shape[0], -1)[expert]
        if self.offset is None:
            return scales
        first = (expert or 0) * len(scales)
        nested = torch.arange(first, first + len(scales), dtype=torch.int32, device=scales.device) // NESTED_BLOCK
        numbers = weight.part("nested_quant_map").index_select(0, scales.int())  # much faster than indexing
        return numbers.mul_(weight.part("nested_absmax").index_select(0, nested)).add_(self.offset)

    def _rows(self, weight: QuantizedWeight, rows: slice, blocks: Tensor, scales: Tensor) -> Tensor:
        """Some rows of W [O, I], in `dtype`."""
        (outputs, inputs), size = weight.shape[-2:], self.group_size
        begin, end, _ = rows.indices(outputs)
        is_stack = len(weight.shape) == 3  # stored in x out
        lines = inputs if is_stack else 1
        if not is_stack:
            begin, end = begin * inputs, end * inputs
        first, last = begin // size, -(-end // size)
        blocks, scales = (part.unflatten(0, (lines, -1))[:, first:last] for part in (blocks, scales))
        numbers = self._numbers(weight.part("quant_map"), blocks.flatten(0, 1), scales.flatten()).view(lines, -1)
        numbers = numbers[:, begin - first * size : end - first * size]
        return numbers.mT if is_stack else numbers.view(-1, inputs)

    def _numbers(self, quant_map: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
        """[blocks, numbers]. Both numbers of a byte are looked up at once."""
        pairs = torch.cartesian_prod(quant_map, quant_map).view(torch.int64).flatten()
        numbers = pairs.index_select(0, blocks.flatten().int()).view(torch.float32).view(len(blocks), -1)
        return numbers.mul_(scales[:, None]).to(self.dtype)
