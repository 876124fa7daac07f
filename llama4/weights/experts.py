"""Routed experts as three Linears each, and stacked.

In many files every expert is three Linears, `experts.7.gate_proj.weight` and so on, out x in, quantized or not. In the
model the experts of a layer are stacked, gate over up. `StackedSource` stacks them, `ExpandedSource` takes them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.progress import track
from llama4.quantization.weight import Shape, TensorSpec, WeightFormat
from llama4.reading import LIMITS
from llama4.units import bytes_text
from llama4.weights import memory
from llama4.weights.source import Noted, Origin, Source

EXPERT = re.compile(
    r"(?P<path>.*\.feed_forward\.experts)\.(?P<index>\d{1,9})\.(?P<matrix>gate|up|down)_proj\.(?P<part>\w+)"
)
"""A tensor of one expert."""
_STACK = re.compile(r"(?P<path>.*\.feed_forward\.experts)\.(?P<matrix>gate_up|down)_proj(\.(?P<part>\w+))?")


@dataclass(frozen=True)
class _Stack:
    """Names in the file: of each expert those of the matrices that lie one below the other."""

    names: tuple[tuple[str, ...], ...]
    in_out: bool
    """Whether the model stores the experts in x out: those that are not quantized."""


def stack_experts(source: Source, room: int | None = None) -> Source:
    """A checkpoint with experts stacked, whichever way it has them.

    Args:
        room: bytes that its weights may take. If they take more, quantized experts that are three Linears each stay so
            if they are in a memory map, to be computed from there: a stack is a copy. None: they are stacked in any
            case.

    Raises:
        CheckpointError: see `StackedSource`.
    """
    if not any(EXPERT.fullmatch(name) for name in source.names()):
        return source
    stacked = StackedSource(source)
    size = sum(source.spec(name).nbytes for name in source.names())
    if room is None or size <= room or not stacked.is_quantized or not _are_mapped(source):
        return stacked
    note = f"its weights take {bytes_text(size)}, and memory has {bytes_text(room)} for them: of the experts it keeps "
    return Noted(source, note + "what it can, and reads the rest from the files whenever tokens are routed to it")


def _are_mapped(source: Source) -> bool:
    """Whether the packed values of all experts are in a file's memory map, and not computed from what is there."""
    return all(
        source.is_mapped(name.removesuffix("weight") + format.parts[0])
        for name, format in source.plan.items()
        if format is not None and EXPERT.fullmatch(name)
    )


class StackedSource:
    """Experts that are three Linears each, stacked, one tensor at a time.

    Args:
        source: in its plan the matrices of a layer's experts have one format, or none.

    Raises:
        CheckpointError: experts of which matrices are missing.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.plan: dict[str, WeightFormat | None] = {}
        self.notes = source.notes
        self._stacks: dict[str, _Stack] = {}
        self._single: dict[str, None] = {}
        experts: dict[str, dict[tuple[str, str], dict[int, str]]] = {}
        for name in source.names():
            if match := EXPERT.fullmatch(name):
                matrix = experts.setdefault(match["path"], {}).setdefault((match["matrix"], match["part"]), {})
                matrix[int(match["index"])] = name
            else:
                self._single[name] = None
        self.plan |= {name: format for name, format in source.plan.items() if not EXPERT.fullmatch(name)}
        for path, matrices in experts.items():
            self._stack(path, matrices)

    def _stack(self, path: str, matrices: dict[tuple[str, str], dict[int, str]]) -> None:
        count = 1 + max(index for names in matrices.values() for index in names)
        if count > LIMITS["num_local_experts"]:
            raise CheckpointError(f"{path} has an expert {count - 1}, and may have {LIMITS['num_local_experts']}")
        parts = sorted({part for _, part in matrices})
        wanted = [(i, matrix, part) for i in range(count) for matrix in ("gate", "up", "down") for part in parts]
        if missing := [
            self._source.origin(f"{path}.{i}.{matrix}_proj.{part}").key
            for i, matrix, part in wanted
            if i not in matrices.get((matrix, part), {})
        ]:
            raise CheckpointError(f"of the {count} experts of {path} some parts are missing; fetch them again", missing)
        self._check_shapes(matrices, parts)
        formats = {
            f"{path}.{stacked}_proj": self._source.plan.get(f"{path}.0.{first}_proj.weight")
            for stacked, first in (("gate_up", "gate"), ("down", "down"))
        }
        in_out = all(format is None for format in formats.values())
        for part in parts:
            suffix = "" if in_out else f".{part}"
            gate, up, down = (matrices[matrix, part] for matrix in ("gate", "up", "down"))
            gate_up = tuple((gate[i], up[i]) for i in range(count))
            self._stacks[f"{path}.gate_up_proj{suffix}"] = _Stack(gate_up, in_out)
            self._stacks[f"{path}.down_proj{suffix}"] = _Stack(tuple((down[i],) for i in range(count)), in_out)
        if not in_out:
            self.plan |= formats

    def _check_shapes(self, matrices: dict[tuple[str, str], dict[int, str]], parts: list[str]) -> None:
        for part in parts:
            for stacked in (("gate", "up"), ("down",)):
                names = [name for matrix in stacked for name in matrices[matrix, part].values()]
                wanted = self._source.spec(names[0]).shape
                if mismatched := [
                    (self._source.origin(name).key, shape, wanted)
                    for name in names
                    if (shape := self._source.spec(name).shape) != wanted
                ]:
                    raise CheckpointError(
                        "experts of one layer differ in shape; fetch them again", mismatched=mismatched
                    )

    @property
    def is_quantized(self) -> bool:
        """Whether all of the experts are."""
        return not any(stack.in_out for stack in self._stacks.values())

    def names(self) -> Collection[str]:
        return [*self._single, *self._stacks]

    def spec(self, name: str) -> TensorSpec:
        if name in self._single:
            return self._source.spec(name)
        stack = self._stacks[name]
        specs = [self._source.spec(matrix) for matrix in stack.names[0]]
        rows, columns = sum(spec.shape[0] for spec in specs), specs[0].shape[1]
        shape = (len(stack.names), columns, rows) if stack.in_out else (len(stack.names), rows, columns)
        dtypes = {self._source.spec(matrix).dtype for names in stack.names for matrix in names}
        return TensorSpec(shape, reduce(torch.promote_types, dtypes))

    def read(self, name: str) -> Tensor:
        if name in self._single:
            return self._source.read(name)
        stack = self._stacks[name]
        whole = memory.empty(*self.spec(name))
        for expert, names in track(list(zip(whole, stack.names, strict=True))):
            matrix = torch.cat([self._source.read(one) for one in names])
            expert.copy_(matrix.mT if stack.in_out else matrix)
        return whole

    def is_mapped(self, name: str) -> bool:
        return name in self._single and self._source.is_mapped(name)

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._stacks[name].names[0][0] if name in self._stacks else name)


@dataclass(frozen=True)
class _Slice:
    """Part of a stacked tensor: of one expert, some of the rows."""

    name: str
    expert: int
    index: int
    count: int
    """The rows are number `index` of `count` equal runs."""
    in_out: bool

    def shape(self, stacked: Shape) -> Shape:
        rows, columns = (stacked[2], stacked[1]) if self.in_out else stacked[1:]
        return rows // self.count, columns

    def of(self, stacked: Tensor) -> Tensor:
        matrix = stacked[self.expert].mT if self.in_out else stacked[self.expert]
        return matrix.chunk(self.count)[self.index]


class ExpandedSource:
    """What `StackedSource` stacks, taken apart: each expert's matrices, and the shapes of those that are packed.

    Args:
        source: tensors of the model, with the parts of packed weights.

    Attributes:
        formats: quantized module -> its format.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.plan, self.notes = source.plan, source.notes
        self.formats: dict[str, WeightFormat] = {}
        self._single: dict[str, None] = {}
        self._slices: dict[str, _Slice] = {}
        self._shapes: dict[str, Tensor] = {}
        self._per_matrix: set[str] = set()
        self._last: tuple[str, Tensor | None] = ("", None)
        for name in source.names():
            match = _STACK.fullmatch(name)
            if match is None:
                self._single[name] = None
                module = name.rpartition(".")[0]
                self._note(name, source.spec(name), self.plan.get(f"{module}.weight"))
                continue
            path, part, in_out = match["path"], match["part"] or "weight", match["part"] is None
            halves = ("gate", "up") if match["matrix"] == "gate_up" else ("down",)
            spec, format = source.spec(name), self.plan.get(f"{path}.{match['matrix']}_proj")
            for i in range(spec.shape[0]):
                for k, half in enumerate(halves):
                    new, piece = f"{path}.{i}.{half}_proj.{part}", _Slice(name, i, k, len(halves), in_out)
                    self._slices[new] = piece
                    self._note(new, spec._replace(shape=piece.shape(spec.shape)), format)

    def _note(self, name: str, spec: TensorSpec, format: WeightFormat | None) -> None:
        """The format of a quantized module, and the shape that its packed values stand for."""
        module, _, part = name.rpartition(".")
        if format is None or part not in format.parts:
            return
        self.formats[module] = format
        if part in format.per_matrix:
            self._per_matrix.add(name)
        if part == "weight_packed" and spec.dtype == torch.int32:
            values_in_one = spec.dtype.itemsize * 8 // format.bits
            self._shapes[f"{module}.weight_shape"] = torch.tensor([spec.shape[0], spec.shape[1] * values_in_one])

    def names(self) -> Collection[str]:
        return [*self._single, *self._slices, *self._shapes]

    def spec(self, name: str) -> TensorSpec:
        if name in self._shapes:
            return TensorSpec((2,), torch.int64)
        if name in self._single:
            spec = self._source.spec(name)
        else:
            piece = self._slices[name]
            spec = self._source.spec(piece.name)
            spec = spec._replace(shape=piece.shape(spec.shape))
        return spec._replace(shape=(1,)) if name in self._per_matrix else spec

    def read(self, name: str) -> Tensor:
        if name in self._shapes:
            return self._shapes[name]
        values = self._source.read(name) if name in self._single else self._slice(self._slices[name])
        return values[0] if name in self._per_matrix else values

    def _slice(self, piece: _Slice) -> Tensor:
        if self._last[0] != piece.name:
            self._last = ("", None)
            self._last = (piece.name, self._source.read(piece.name))
        assert self._last[1] is not None
        return piece.of(self._last[1])

    def is_mapped(self, name: str) -> bool:
        return name in self._single and name not in self._per_matrix and self._source.is_mapped(name)

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._slices[name].name if name in self._slices else name)
