"""`Source`: a checkpoint as named tensors, which can be asked about without reading them, in the names of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import TensorSpec


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor comes from, for error messages.

    Attributes:
        key: its name in the file; of one that is made of several, the first or all of them.
        file: the file; None if the tensor is not there, or is of no file.
    """

    key: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.key} in {self.file}" if self.file is not None else self.key


class Source(Protocol):
    """Named tensors, read when they are asked for.

    Sources are views of each other: one reads files, the next renames, another stacks experts or quantizes. Whoever
    uses a source sees the names of the model alone, and tensors in its shapes. A tensor that the model has no place for
    has its key for a name.
    """

    @property
    def plan(self) -> QuantizationPlan:
        """Which parameters of the model are stored quantized: their parts are here, `q_proj.weight_scale` and so on."""

    @property
    def notes(self) -> Sequence[str]:
        """What is done with the checkpoint that may not be expected, in sentences: what is dequantized or left out."""

    def names(self) -> Collection[str]: ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype, without reading the tensor."""

    def read(self, name: str) -> Tensor: ...

    def is_mapped(self, name: str) -> bool:
        """Whether `read` returns part of a file's memory map: no copy, and pages that are read when they are used."""

    def origin(self, name: str) -> Origin:
        """Where a tensor comes from; of a name that is not here, what its key would be."""


class View:
    """Base of sources that show another one under other names, one tensor for one.

    Args:
        source: what is shown.
        names: name here -> name there; by default they are the same.
        plan: see `Source.plan`; by default that of the source.
    """

    def __init__(
        self, source: Source, names: Mapping[str, str] | None = None, plan: QuantizationPlan | None = None
    ) -> None:
        self._source = source
        self._names = {name: name for name in source.names()} if names is None else names
        self.plan = source.plan if plan is None else plan
        self.notes = source.notes

    def names(self) -> Collection[str]:
        return self._names.keys()

    def spec(self, name: str) -> TensorSpec:
        return self._source.spec(self._names[name])

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])

    def is_mapped(self, name: str) -> bool:
        return self._source.is_mapped(self._names[name])

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._names.get(name, name))


class Noted(View):
    """A source with one note more."""

    def __init__(self, source: Source, note: str) -> None:
        super().__init__(source)
        self.notes = [*source.notes, note]


def without(source: Source, is_left_out: Callable[[str], object], note: str) -> Source:
    """A source that lacks some tensors, and says so: the note is about them, in words."""
    names = {name: name for name in source.names() if not is_left_out(name)}
    if not (count := len(source.names()) - len(names)):
        return source
    return Noted(View(source, names), f"{count} tensors are left out: {note}")


class Copied(View):
    """Tensors in memory of their own, so that the files that they come from may go."""

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor.clone() if super().is_mapped(name) else tensor

    def is_mapped(self, name: str) -> bool:
        return False


class ModelNames(View):
    """Files of a family under the names of the model.

    Raises:
        CheckpointError: two keys that are the same tensor of the model.
    """

    def __init__(self, files: Source, table: NameTable) -> None:
        names: dict[str, str] = {}
        twice = []
        for key in files.names():
            if table.is_dropped(key):
                continue
            name = table.to_model(key) or key
            if names.setdefault(name, key) != key:
                twice += [names[name], key]
        if twice:
            raise CheckpointError("the checkpoint names the same tensor of the model twice", unexpected=twice)
        super().__init__(files, names)
        self._table = table

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._names.get(name) or self._table.to_file(name) or name)


class FileNames(View):
    """The way back: tensors of the model under the names of a family's files."""

    def __init__(self, source: Source, table: NameTable) -> None:
        super().__init__(source, {table.to_file(name) or name: name for name in source.names()})


class RowOrder(View):
    """Tensors of the model, of which some have their rows in another order than here.

    Args:
        source: under the model's names; parts of packed weights are as they are run, with a row per output.
        order: how a tensor changes, by its name; None if it does not.
    """

    def __init__(self, source: Source, order: Callable[[str], Callable[[Tensor], Tensor] | None]) -> None:
        super().__init__(source)
        self._order = order

    def read(self, name: str) -> Tensor:
        order, tensor = self._order(name), super().read(name)
        return tensor if order is None else order(tensor)

    def is_mapped(self, name: str) -> bool:
        return self._order(name) is None and super().is_mapped(name)


def in_model_order(source: Source, table: NameTable) -> Source:
    """Rows as the model has them, of a checkpoint that has those of a family's files."""
    return RowOrder(source, lambda name: t.to_model if (t := table.transform(name)) else None)


def in_file_order(source: Source, table: NameTable) -> Source:
    """The way back."""
    return RowOrder(source, lambda name: t.to_file if (t := table.transform(name)) else None)


class Tensors:
    """Tensors in memory, under their names."""

    plan: QuantizationPlan = {}  # noqa: RUF012 (never changed)
    notes: Sequence[str] = ()

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(tuple(self._tensors[name].shape), self._tensors[name].dtype)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def is_mapped(self, name: str) -> bool:
        return False

    def origin(self, name: str) -> Origin:
        return Origin(name)
