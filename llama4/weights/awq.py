"""Checkpoints of AWQ, as AutoAWQ writes them in its version GEMM: four bits, always with zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.quantization.weight import Shape
from llama4.weights.compressed_formats import codes
from llama4.weights.in_out import WORD, InOut, unstacked, words
from llama4.weights.quant_method import QuantMethod
from llama4.weights.source import Source
from llama4.weights.stored import DecodedSource

_BITS = 4
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of the eight values in a word, the lowest first, which one each of eight neighbours is."""


@dataclass(frozen=True)
class AwqFormat(InOut):
    """`qweight` [I, words]: the values of an input, eight outputs in an int32, and these not in order."""

    name = "AWQ"

    bits: int = _BITS
    is_symmetric: bool = False
    is_in_order: bool = True

    def inputs(self, qweight: Shape) -> int:
        return qweight[0]

    def qweight(self, shape: Shape) -> Shape:
        outputs, inputs = shape
        return inputs, words(outputs, self.bits)

    def values(self, qweight: Tensor, rows: slice, inputs: int) -> Tensor:
        some = slice(rows.start * self.bits // WORD, words(rows.stop, self.bits))
        return _in_order(qweight[:, some])[:, : rows.stop - rows.start].mT

    def zero_points(self, qzeros: Tensor, outputs: int) -> Tensor:
        return _in_order(qzeros)[:, :outputs]


class Awq(QuantMethod):
    """Read only. Which weights are quantized, and in which groups, the tensors say."""

    name = "awq"

    def check(self, content: Mapping[str, Any]) -> None:
        bits = content.get("bits", content.get("w_bit", _BITS))
        version = str(content.get("checkpoint_format") or content.get("format") or content.get("version") or "gemm")
        if bits != _BITS or version.lower() != "gemm":
            raise CheckpointError(
                f"the checkpoint is quantized by AWQ to {bits!r} bits in the version {version!r}, which this library "
                f"does not read; take one of {_BITS} bits in 'gemm', or in bf16"
            )

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        source = unstacked(source)
        modules = (name.removesuffix(".qweight") for name in source.names() if name.endswith(".qweight"))
        return DecodedSource(source, dict.fromkeys(modules, AwqFormat()), dtype)


def _in_order(packed: Tensor) -> Tensor:
    """[N, W], int32 -> [N, 8 W], uint8."""
    count = WORD // _BITS * packed.shape[1]
    return codes(packed, _BITS, count).unflatten(-1, (-1, len(_ORDER)))[..., _ORDER].flatten(-2)
