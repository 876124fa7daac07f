"""Integers of a few bits with a scale and a zero point per group of inputs, in x out, as GPTQ and AWQ have them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from llama4.errors import CheckpointError, Llama4Error
from llama4.progress import track
from llama4.quantization.int4 import GROUP_SIZES, Int4, pack
from llama4.quantization.int4_zeros import SCALES, Int4Zeros
from llama4.quantization.int8 import Int8
from llama4.quantization.weight import ROWS, Shape, WeightFormat
from llama4.reading import LIMITS
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.source import Source
from llama4.weights.stored import Specs, StoredFormat

WORD = 32
"""Bits of what values are packed in."""
_STACK = re.compile(
    r"(?P<path>.*\.feed_forward\.experts)\.(?P<matrix>gate_up|down)_proj\.(?P<part>qweight|qzeros|scales|g_idx)"
)


_DIMENSIONS = {"qweight": 2, "scales": 2, "qzeros": 2, "g_idx": 1}
"""Of the tensors of a matrix."""


@dataclass(frozen=True)
class InOut(StoredFormat):
    """W = (values - zero point) * scale, with values and zero points from 0 to 2^bits - 1.

    Its tensors are `qweight`, the values, packed; `scales` [G, O]; `qzeros` [G, words], packed along O; and, it may be,
    `g_idx` [I], the group of each input.

    Attributes:
        bits: of a value.
        is_symmetric: whether all zero points are 2^(bits - 1).
        is_in_order: whether groups are runs of inputs.
        order: the inputs sorted by their groups, where these are no runs and have one size: `order_by_groups`.
    """

    is_in_out = True
    name: ClassVar[str]

    bits: int
    is_symmetric: bool
    is_in_order: bool
    order: Tensor | None = field(default=None, kw_only=True, compare=False)

    def __str__(self) -> str:
        zeros = "" if self.is_symmetric else ", with zero points"
        sizes = "" if self.order is not None else " and of several sizes"
        order = "" if self.is_in_order else f", groups in the order of activations{sizes}"
        return f"{self.name} of {self.bits} bits{zeros}{order}"

    @abstractmethod
    def inputs(self, qweight: Shape) -> int:
        """I, by the shape of `qweight`."""

    @abstractmethod
    def qweight(self, shape: Shape) -> Shape:
        """The shape of `qweight` of a matrix [O, I]."""

    @abstractmethod
    def values(self, qweight: Tensor, rows: slice, inputs: int) -> Tensor:
        """Those of some outputs [rows, I], uint8."""

    @abstractmethod
    def zero_points(self, qzeros: Tensor, outputs: int) -> Tensor:
        """[G, O], uint8."""

    # -- what there is to read -----------------------------------------------------------------------------------------

    def shape(self, specs: Specs) -> Shape:
        for part in _DIMENSIONS:
            if part in specs and not is_shaped(specs, part):
                raise Llama4Error(f"has {part} of the shape {list(specs[part].shape)}")
        (groups, outputs), found = specs["scales"].shape, specs["qweight"]
        inputs = specs["g_idx"].shape[0] if "g_idx" in specs else self.inputs(found.shape)
        wanted = {"qweight": self.qweight((outputs, inputs)), "qzeros": (groups, words(outputs, self.bits))}
        for part, shape in wanted.items():
            if specs[part] != (shape, torch.int32):
                spec = specs[part]
                raise Llama4Error(f"has {part} {list(spec.shape)} in {spec.dtype}, not {list(shape)} in int32")
        return outputs, inputs

    def native(self, specs: Specs) -> WeightFormat | None:
        (_, inputs), groups = self.shape(specs), specs["scales"].shape[0]
        if inputs % groups or not (self.is_in_order or self.order is not None):
            return None
        native = self._of_groups(inputs // groups, specs)
        return native and replace(native, order=self.order)

    def _of_groups(self, size: int, specs: Specs) -> WeightFormat | None:
        """A group that is larger than int4's is several with the same scale."""
        groups = specs["scales"].shape[0]
        if self.bits == 8:
            return Int8() if self.is_symmetric and groups == 1 else None
        if not self.is_symmetric:
            return Int4Zeros(size, dtype) if size % 32 == 0 and (dtype := specs["scales"].dtype) in SCALES else None
        sizes = [size] if size in GROUP_SIZES else [own for own in GROUP_SIZES if size % own == 0]
        return Int4(max(sizes)) if sizes else None

    def native_parts(self, native: WeightFormat, specs: Specs) -> dict[str, tuple[str, ...]]:
        if isinstance(native, Int4Zeros):
            return {native.parts[0]: ("qweight", "qzeros", "scales")}
        return {native.parts[0]: ("qweight",), "weight_scale": ("scales", "qzeros")}

    def to_native(self, native: WeightFormat, part: str, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        outputs, inputs = shape
        if part == "weight_scale":
            zeros, middle = self.zero_points(tensors["qzeros"], outputs), 1 << self.bits - 1
            if (others := zeros[zeros != middle]).numel():
                raise Llama4Error(f"a zero point is {int(others[0])}, which in symmetric weights is {middle}")
            scales = tensors["scales"].mT
            return scales.repeat_interleave(native.part_specs(shape)[part].shape[1] // scales.shape[1], dim=1)
        if not isinstance(native, Int4Zeros):
            return self.repacked(native, tensors["qweight"], shape)
        zeros, scales = self.zero_points(tensors["qzeros"], outputs).mT, tensors["scales"].mT
        blocks = (
            native.encode(native.sort(self.values(tensors["qweight"], rows, inputs)), zeros[rows], scales[rows])
            for rows in track(_runs(outputs))
        )
        return torch.cat([*blocks])

    def repacked(self, native: WeightFormat, qweight: Tensor, shape: Shape) -> Tensor:
        """Values of up to 4 bits as int4 has them, those of 8 as int8 does."""
        outputs, inputs = shape
        middle = 1 << self.bits - 1
        values_RI = (native.sort(self.values(qweight, rows, inputs)) for rows in track(_runs(outputs)))
        signed = ((values - middle).view(torch.int8) for values in values_RI)
        return torch.cat([values if self.bits == 8 else pack(values) for values in signed])

    # -- the matrix ----------------------------------------------------------------------------------------------------

    def dequantize(self, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        groups, outputs = parts["scales"].shape
        inputs = len(parts["g_idx"]) if "g_idx" in parts else self.inputs(tuple(parts["qweight"].shape))
        group_of = torch.arange(inputs) // -(-inputs // groups) if self.is_in_order else parts["g_idx"].long()
        if group_of.min() < 0 or group_of.max() >= groups:
            raise Llama4Error(f"its groups are {int(group_of.min())} to {int(group_of.max())}, and there are {groups}")
        zeros = self.zero_points(parts["qzeros"], outputs)[:, rows].mT.float()
        values = self.values(parts["qweight"], rows, inputs).float()
        return values.sub_(zeros[:, group_of]).mul_(parts["scales"][:, rows].mT.float()[:, group_of])


def _runs(outputs: int) -> list[slice]:
    """Outputs that are unpacked at a time."""
    return [slice(at, min(at + ROWS, outputs)) for at in range(0, outputs, ROWS)]


def words(count: int, bits: int) -> int:
    """How many int32 values take."""
    return -(-count * bits // WORD)


def is_shaped(specs: Specs, *parts: str) -> bool:
    """Whether tensors are there, have as many dimensions as they should, and something in each."""
    return all(
        part in specs and len(specs[part].shape) == _DIMENSIONS[part] and 0 not in specs[part].shape for part in parts
    )


def unstacked(source: Source) -> Source:
    """Experts whose tensors are stacked, `experts.gate_up_proj.qweight` [E, ...] and so on, as three Linears each.

    Raises:
        CheckpointError: stacks of other shapes.
    """
    tensors: dict[str, str | Computed] = {}
    for name in source.names():
        match, (shape, dtype) = _STACK.fullmatch(name), source.spec(name)
        if match is None:
            tensors[name] = name
            continue
        if len(shape) != _DIMENSIONS[match["part"]] + 1 or not 0 < shape[0] <= LIMITS["num_local_experts"]:
            raise CheckpointError(f"{source.origin(name).key} has the shape {list(shape)}; fetch it again")
        halves = ("gate", "up") if match["matrix"] == "gate_up" else ("down",)
        count = 1 if match["part"] == "g_idx" else len(halves)  # both halves have the same inputs
        for i, (k, half) in product(range(shape[0]), enumerate(halves)):

            def one(parts: Mapping[str, Tensor], i: int = i, k: int = k % count, count: int = count) -> Tensor:
                return parts["stack"][i].chunk(count, dim=-1)[k]

            piece = (*shape[1:-1], shape[-1] // count)
            tensors[f"{match['path']}.{i}.{half}_proj.{match['part']}"] = Computed({"stack": name}, piece, dtype, one)
    return ComputedSource(source, tensors, source.plan)
