"""Checkpoints of GPTQ, as AutoGPTQ, GPTQModel and transformers write them.

Beside `qweight`, `qzeros` and `scales` (see in_out.py) there is `g_idx`, the group of each input; groups are not in
order where inputs were quantized in the order of their activations. In version 1 of the format zero points are stored
less 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.quantization.weight import Shape, TensorSpec, WeightFormat
from llama4.weights.compressed_formats import codes
from llama4.weights.in_out import WORD, InOut, is_shaped, unstacked, words
from llama4.weights.ordered import order_by_groups
from llama4.weights.quant_method import QuantMethod
from llama4.weights.source import Source
from llama4.weights.stored import DecodedSource, Specs

BITS = (2, 3, 4, 8)
_LESS_ONE, _AS_THEY_ARE = "gptq", "gptq_v2"
"""`checkpoint_format`: how zero points are stored."""


@dataclass(frozen=True)
class GptqFormat(InOut):
    """`qweight` [words, O]: the values of an output are one run of bits, the lowest first.

    Attributes:
        has_less_one: whether zero points are stored less 1.
    """

    name = "GPTQ"

    has_less_one: bool

    def inputs(self, qweight: Shape) -> int:
        return qweight[0] * WORD // self.bits

    def qweight(self, shape: Shape) -> Shape:
        outputs, inputs = shape
        return words(inputs, self.bits), outputs

    def values(self, qweight: Tensor, rows: slice, inputs: int) -> Tensor:
        return codes(qweight[:, rows].mT, self.bits, inputs)

    def zero_points(self, qzeros: Tensor, outputs: int) -> Tensor:
        """Packers subtract 1 from all of a word at once, so that a zero point of 0 borrows from its neighbour; those of
        3 bits, which lie across words, are on their own."""
        if not self.has_less_one:
            return codes(qzeros, self.bits, outputs)
        if WORD % self.bits:
            return codes(qzeros, self.bits, outputs) + 1 & (1 << self.bits) - 1
        return codes(qzeros + sum(1 << at for at in range(0, WORD, self.bits)), self.bits, outputs)

    def repacked(self, native: WeightFormat, qweight: Tensor, shape: Shape) -> Tensor:
        lies_so = self.bits == 4 and native.order is None
        return qweight.mT if lies_so else super().repacked(native, qweight, shape)


class Gptq(QuantMethod):
    """Read only: what is written is in the compressed-tensors format. Which weights are quantized, to how many bits and
    in which groups, the tensors say."""

    name = "gptq"

    def check(self, content: Mapping[str, Any]) -> None:
        layout = _layout(content)
        if layout not in (_LESS_ONE, _AS_THEY_ARE) or content.get("bits", 4) not in BITS:
            raise CheckpointError(
                f"the checkpoint is quantized by GPTQ to {content.get('bits')!r} bits in the format {layout!r}, which "
                f"this library does not read; take one of {', '.join(map(str, BITS))} bits in {_LESS_ONE!r} or "
                f"{_AS_THEY_ARE!r}, or in bf16"
            )

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        source, has_less_one = unstacked(source), _layout(content) == _LESS_ONE
        dynamic = content.get("dynamic")
        others = dynamic.values() if isinstance(dynamic, dict) else ()
        is_symmetric = all(some.get("sym", True) for some in (content, *others) if isinstance(some, dict))
        specs: dict[str, dict[str, TensorSpec]] = {}
        for name in source.names():
            module, _, part = name.rpartition(".")
            specs.setdefault(module, {})[part] = source.spec(name)
        stored = {}
        for module, own in specs.items():
            if "qweight" not in own:
                continue
            is_in_order, order = True, None
            if is_shaped(own, "g_idx", "scales"):
                g_idx = source.read(f"{module}.g_idx")
                is_in_order = _is_in_order(g_idx, own)
                order = None if is_in_order else order_by_groups(g_idx, own["scales"].shape[0])
            bits = _bits(own, int(content.get("bits", 4)))
            stored[module] = GptqFormat(bits, is_symmetric, is_in_order, has_less_one, order=order)
        return DecodedSource(source, stored, dtype)


def _layout(content: Mapping[str, Any]) -> str:
    if content.get("is_marlin_format"):
        return "marlin"
    return content.get("checkpoint_format") or content.get("format") or _LESS_ONE


def _bits(specs: Specs, default: int) -> int:
    """Of a value: one module may have others than the configuration says of all."""
    if not is_shaped(specs, "qzeros", "scales"):
        return default  # they are missing or of another shape, as will be said
    found, outputs = specs["qzeros"].shape[-1], specs["scales"].shape[-1]
    return next((bits for bits in (default, *BITS) if words(outputs, bits) == found), default)


def _is_in_order(g_idx: Tensor, specs: Specs) -> bool:
    groups = specs["scales"].shape[0]
    return torch.equal(g_idx.long(), torch.arange(len(g_idx)) // -(-len(g_idx) // groups))
