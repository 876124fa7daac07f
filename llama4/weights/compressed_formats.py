"""What the tensors of the compressed-tensors format mean, by the fields of its configuration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.quantization.formats import FORMATS
from llama4.quantization.fp8 import Fp8
from llama4.quantization.int4 import GROUP_SIZES, Int4, pack
from llama4.quantization.int4_zeros import SCALES, Int4Zeros
from llama4.quantization.int8 import Int8
from llama4.quantization.weight import QuantizedWeight, Shape, TensorSpec, WeightFormat
from llama4.weights.stored import Specs, StoredFormat

_DTYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}


class CompressedFormat(StoredFormat):
    """A way to store matrices that a group of the configuration describes. A new one is a subclass, registered in
    `COMPRESSED_FORMATS`."""

    about: ClassVar[str]
    """What `from_group` reads, in words."""

    @classmethod
    @abstractmethod
    def from_group(cls, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Self | None:
        """The format that a group means, if it is of this kind.

        Args:
            weights: `weights` of the group.
            inputs: `input_activations` of the group.
        """


@dataclass(frozen=True)
class Scaled(CompressedFormat):
    """W = (values - zero point) * scale, where each block of W has a scale and, it may be, a zero point.

    Values are `weight`, int8 or e4m3, or values of a few bits in `weight_packed`: a row is one run of bits, in int32 or
    bytes, the lowest first. Integers are stored larger by 2^(bits - 1), floats are e2m3. Zero points are packed in the
    same way, along the columns. `weight_g_idx` has the group of each column, where these are not in order.

    Attributes:
        kind: "int" or "float".
        block: rows and columns that share a scale; None stands for all.
        has_zero_points: whether some may be other than 0.
        inputs: what is to be done to inputs: (type, strategy) of their rounding, or None.
        has_powers: whether scales are powers of two, of which the exponents are stored: the MX formats.
        order: of a matrix with `weight_g_idx`: its columns sorted by their groups, see `ordered.order_by_groups`.
    """

    about = "integers of 1 to 8 bits and fp8, with a scale per tensor, channel, group or block, MXFP8, MXFP6"

    kind: str
    bits: int
    block: tuple[int | None, int | None]
    has_zero_points: bool = False
    inputs: tuple[str, str] | None = None
    has_powers: bool = False
    order: Tensor | None = field(default=None, kw_only=True, compare=False)

    def __str__(self) -> str:
        rows, columns = self.block
        name = f"int{self.bits}" if self.kind == "int" else f"{'mx' if self.has_powers else ''}fp{self.bits}"
        area = {(1, columns): f"{columns} weights", (1, None): "output", (None, None): "matrix"}
        scales = f"a scale{' and a zero point' if self.has_zero_points else ''} per "
        scales += area.get(self.block, f"block of {rows} x {columns}")
        scales += ", groups in the order of activations" if self.order is not None else ""
        is_for_weights = self.kind == "float" and self.inputs is None
        return f"{name}, {scales}" + (", inputs not rounded" if is_for_weights else "")

    @classmethod
    def from_group(cls, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Self | None:
        kind, bits, size = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("group_size")
        blocks: dict[str, tuple[int | None, int | None]] = {"tensor": (None, None), "channel": (1, None)}
        has_powers = weights.get("scale_dtype") in ("torch.uint8", "torch.float8_e8m0fnu")
        known = {("float", 8), ("float", 6)} if has_powers else {("float", 8), *(("int", n) for n in range(1, 9))}
        if weights.get("dynamic") or (kind, bits) not in known:
            return None
        strategy = weights.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
        if strategy == "group":
            blocks["group"] = (1, size)
        elif strategy == "block":
            structure = weights.get("block_structure")
            rows, columns = structure.split("x") if isinstance(structure, str) else structure or (128, 128)
            blocks["block"] = (int(rows), int(columns))
        if strategy not in blocks or any(step is not None and step < 1 for step in blocks[strategy]):
            return None
        rounding = (inputs.get("type", "int"), inputs.get("strategy") or "tensor") if inputs else None
        return cls(kind, bits, blocks[strategy], not weights.get("symmetric", True), rounding, has_powers)

    # -- what there is to read -----------------------------------------------------------------------------------------

    def shape(self, specs: Specs) -> Shape:
        scale = specs["weight_scale"].shape
        if "weight_packed" in specs:
            (outputs, words), bits = specs["weight_packed"].shape, specs["weight_packed"].dtype.itemsize * 8
            inputs = words * bits // self.bits if self.block[1] is None else scale[-1] * self.block[1]
            if words != -(-inputs * self.bits // bits):
                raise Llama4Error(f"has {words} int{bits} in a row, which are not its {inputs} values")
        elif "weight" in specs:
            outputs, inputs = specs["weight"].shape
            if (found := specs["weight"].dtype) != _DTYPES[self.kind]:
                raise Llama4Error(f"its values are {found}, not {_DTYPES[self.kind]}")
        else:
            raise KeyError("weight_packed" if "weight_shape" in specs else "weight")
        wanted = tuple(-(-size // (step or size)) for size, step in zip((outputs, inputs), self.block, strict=True))
        if _two_dimensions(scale) != wanted:
            raise Llama4Error(f"has scales {list(scale)}, where {list(wanted)} were expected")
        if (zeros := specs.get("weight_zero_point")) is not None:
            packed = (-(-wanted[0] * self.bits // 32), wanted[1])
            if _two_dimensions(zeros.shape) != (packed if zeros.dtype == torch.int32 else wanted):
                raise Llama4Error(f"has zero points {list(zeros.shape)} beside scales {list(scale)}")
        elif self.has_zero_points:
            raise KeyError("weight_zero_point")
        if "weight_g_idx" in specs and (groups := specs["weight_g_idx"].shape) != (inputs,):
            raise Llama4Error(f"has groups {list(groups)} of its {inputs} inputs")
        return outputs, inputs

    def native(self, specs: Specs) -> WeightFormat | None:
        """Inputs that a scheme rounds to integers are left as they are, which is more exact; those that it rounds to
        e4m3 with a fixed scale, or one per token, are rounded with one per token, by which none is clipped."""
        if self.has_powers or ("weight_g_idx" in specs and (self.order is None or self.bits != 4)):
            return None
        native = self._in_order(specs)
        return native and replace(native, order=self.order)

    def _in_order(self, specs: Specs) -> WeightFormat | None:
        """The format of the same values with the columns sorted."""
        inputs, (rows, columns) = self.shape(specs)[1], self.block
        if "weight_zero_point" in specs:
            dtype = specs["weight_scale"].dtype
            if (self.kind, self.bits, rows) != ("int", 4, 1) or columns is None or dtype not in SCALES:
                return None
            return Int4Zeros(columns, dtype) if columns % 32 == 0 and inputs % columns == 0 else None
        is_rounded = self.inputs is not None and self.inputs[0] == "float"
        match self.kind, self.bits, columns:
            case "int", 8, None:
                return Int8()
            case "int", 4, int() if rows == 1 and columns in GROUP_SIZES and inputs % columns == 0:
                return Int4(columns)
            case "float", 8, None if is_rounded:
                return Fp8()
            case "float", 8, int() if is_rounded and rows == 1 and inputs % columns == 0:
                return Fp8(columns)
        return None

    def native_parts(self, native: WeightFormat, specs: Specs) -> dict[str, tuple[str, ...]]:
        values = "weight_packed" if "weight_packed" in specs else "weight"
        if isinstance(native, Int4Zeros):
            return {native.parts[0]: (values, "weight_zero_point", "weight_scale")}
        return {native.parts[0]: (values,), "weight_scale": ("weight_scale",)}

    def to_native(self, native: WeightFormat, part: str, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        if isinstance(native, Int4Zeros):
            stored, zeros, scales = tensors.values()
            values = unpack(stored, 4, shape[1]) if stored.dtype == torch.int32 else stored
            zeros = unpack(zeros.mT, 4, shape[0]).mT if zeros.dtype == torch.int32 else zeros
            return native.encode(native.sort(values + 8).view(torch.uint8), (zeros + 8).view(torch.uint8), scales)
        (tensor,) = tensors.values()
        if part == "weight_scale":
            return _per_row(_as_matrix(tensor), self.block[0], slice(0, shape[0]))
        if part == "weight_packed" and (tensor.dtype == torch.int8 or native.order is not None):
            values = unpack(tensor, 4, shape[1]) if tensor.dtype == torch.int32 else tensor
            return pack(native.sort(values))
        if part == "weight_packed":
            return tensor
        return unpack(tensor, 8, shape[1]) if tensor.dtype == torch.int32 else tensor

    # -- the matrix ----------------------------------------------------------------------------------------------------

    def dequantize(self, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        if "weight_packed" in parts:
            packed = parts["weight_packed"]
            columns = packed.shape[1] * packed.itemsize * 8 // self.bits
            columns = int(parts["weight_shape"][1]) if "weight_shape" in parts else columns
            values = (unpack if self.kind == "int" else unpack_e2m3)(packed[rows], self.bits, columns).float()
        else:
            values = parts["weight"][rows].float()
        columns = values.shape[1]
        scale = _as_matrix(parts["weight_scale"])
        if self.has_powers:
            scale = scale.view(torch.float8_e8m0fnu)
        groups = torch.arange(columns) // (self.block[1] or columns)
        if "weight_g_idx" in parts and (order := parts["weight_g_idx"].long()).min() >= 0:
            groups = order
        if groups.max() >= scale.shape[1]:
            raise Llama4Error(f"a column is of group {int(groups.max())}, of {scale.shape[1]}")
        if (zeros := parts.get("weight_zero_point")) is not None:
            if zeros.dtype == torch.int32:
                zeros = unpack(zeros.mT, self.bits, scale.shape[0]).mT
            values -= _per_row(_as_matrix(zeros).float(), self.block[0], rows)[:, groups]
        return values.mul_(_per_row(scale.float(), self.block[0], rows)[:, groups])


@dataclass(frozen=True)
class NativeFormat(CompressedFormat):
    """A format that is run, whose parts are what lies in the file."""

    about = "NVFP4 and MXFP4"

    format: WeightFormat

    def __str__(self) -> str:
        return str(self.format)

    @classmethod
    def from_group(cls, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Self | None:
        found = (format.from_compressed(weights, inputs) for format in FORMATS.values())
        return next((cls(format) for format in found if format is not None), None)

    def shape(self, specs: Specs) -> Shape:
        first = self.format.parts[0]
        outputs, inputs = specs[first].shape[0], self.format.weights_in(first, specs[first]) // specs[first].shape[0]
        for part, wanted in self.format.part_specs((outputs, inputs)).items():
            if part not in specs:
                raise KeyError(part)
            if specs[part].shape not in (wanted.shape, (1,)):
                raise Llama4Error(f"has {part} {list(specs[part].shape)}, not {list(wanted.shape)}")
        return outputs, inputs

    def native(self, specs: Specs) -> WeightFormat:
        return self.format

    def to_native(self, native: WeightFormat, part: str, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return tensors[part].expand(self.format.part_specs(shape)[part].shape)

    def dequantize(self, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        some = {
            part: parts[part][rows] if len(parts[part]) > 1 else parts[part].expand(rows.stop - rows.start, 1)
            for part in self.format.parts
        }
        first = self.format.parts[0]
        inputs = self.format.weights_in(first, TensorSpec(tuple(some[first].shape), some[first].dtype)) // len(
            some[first]
        )
        with torch.device("meta"):
            weight = QuantizedWeight(self.format, (len(some[first]), inputs))
        weight.set_parts(some)
        return weight.dequantize().float()


COMPRESSED_FORMATS: tuple[type[CompressedFormat], ...] = (Scaled, NativeFormat)
"""The first that reads a group is how its matrices are stored."""


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Runs of bits [N, W] -> signed integers [N, columns], int8."""
    return (codes(packed, bits, columns) - (1 << bits - 1)).view(torch.int8)


def unpack_e2m3(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Runs of bits [N, W] -> [N, columns], float32: a sign, two bits of exponent, three of mantissa (OCP Microscaling
    Formats, v1.0)."""
    eighths = torch.tensor([m if e == 0 else (8 + m) << e - 1 for e in range(4) for m in range(8)]) / 8
    return torch.cat([eighths, -eighths])[codes(packed, bits, columns).int()]


def codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Runs of bits [N, W], the lowest first -> what each value is stored as [N, columns], uint8."""
    if -(-columns * bits // (8 * packed.itemsize)) != packed.shape[1]:
        raise Llama4Error(f"{columns} values of {bits} bits are not the {packed.shape[1]} {packed.dtype} of a row")
    values = packed.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], dim=-1).flatten(1)[:, :columns]
    elif bits != 8:
        places = torch.arange(8, dtype=torch.uint8)
        runs = (values[..., None] >> places & 1).flatten(1)[:, : columns * bits].unflatten(1, (columns, bits))
        values = (runs << places[:bits]).sum(-1, dtype=torch.uint8)
    return values[:, :columns]


def _two_dimensions(shape: Shape) -> Shape:
    """Scales may lack the dimensions in which there is one: [] and [1] are [1, 1], [O] is [O, 1]."""
    return shape if len(shape) == 2 else (*shape, 1, 1)[:2]


def _as_matrix(scales: Tensor) -> Tensor:
    return scales.reshape(_two_dimensions(tuple(scales.shape)))


def _per_row(scales: Tensor, step: int | None, rows: slice) -> Tensor:
    """Those of some rows of the matrix, one for each row or one for all."""
    if step == 1:
        return scales[rows]
    return scales[torch.arange(rows.start, rows.stop) // (step or rows.stop)]
