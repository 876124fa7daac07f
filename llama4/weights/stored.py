"""Matrices that a file stores in many formats -> the formats that are run, or plain matrices in the model's dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.progress import track
from llama4.quantization.weight import ROWS, Shape, TensorSpec, WeightFormat
from llama4.weights import memory
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.experts import EXPERT
from llama4.weights.source import Source

_NEVER_QUANTIZED = (".router", ".embed_tokens")
"""Modules that the model has in no quantized format."""

Specs = Mapping[str, TensorSpec]
"""The tensors of one matrix: name behind its module's path -> shape and dtype."""


class StoredFormat(ABC):
    """How a file stores a matrix [O, I]: what its tensors mean, and which format that is run has the same values.

    `str` of it names it in messages, with all that a reader needs to know it by.
    """

    is_in_out: ClassVar[bool] = False
    """Whether its tensors are in x out, and none of them is a part of a native format as it lies."""

    @abstractmethod
    def shape(self, specs: Specs) -> Shape:
        """Raises:
        KeyError: a tensor that is missing.
        Llama4Error: tensors that do not fit together.
        """

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Some rows of the matrix, in float32.

        Raises:
            Llama4Error: values that cannot be.
        """

    def native(self, specs: Specs) -> WeightFormat | None:
        """The format that is run and has the same values, if there is one."""
        return None

    def native_parts(self, native: WeightFormat, specs: Specs) -> dict[str, tuple[str, ...]]:
        """Part of the native format -> the tensors in the file that it is made of; of one of its shape and dtype alone
        it is that tensor."""
        return {part: (part,) for part in native.parts}

    def to_native(self, native: WeightFormat, part: str, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Tensors in the file as a part of the native format, for a matrix of this shape.

        Raises:
            Llama4Error: values that are not of that format.
        """
        return tensors[part]


class DecodedSource(ComputedSource):
    """A checkpoint whose quantized matrices are in formats that are run, where there is one with the same values, and
    dequantized where there is none. A layer's experts are dequantized, too, if they have no format in common, or inputs
    in orders of their own: a stack has none.

    Args:
        source: the checkpoint, under the model's names.
        stored: quantized modules, `...self_attn.q_proj`, and how they are stored.
        dtype: of what is dequantized.

    Raises:
        CheckpointError: tensors that are missing, or do not fit together.
    """

    def __init__(self, source: Source, stored: Mapping[str, StoredFormat], dtype: torch.dtype) -> None:
        tensors: dict[str, str | Computed] = {}
        specs: dict[str, dict[str, TensorSpec]] = {module: {} for module in stored}
        for name in source.names():
            module, _, part = name.rpartition(".")
            if module not in stored or part == "bias":
                tensors[name] = name
            else:
                specs[module][part] = source.spec(name)
        shapes = _shapes(source, stored, specs)
        natives = _natives(source.names(), stored, specs)
        for module, native in natives.items():
            stored_as = stored[module], specs[module], shapes[module]
            tensors |= (
                _dequantized(module, *stored_as, dtype) if native is None else _native(module, *stored_as, native)
            )
        plan = {f"{module}.weight": native for module, native in natives.items() if native is not None}
        super().__init__(source, tensors, plan)
        counts = Counter(
            (str(stored[module]), _why_dequantized(module, stored[module].native(specs[module])))
            for module, native in natives.items()
            if native is None
        )
        self.notes = [*source.notes, *(_note(*stored_as, count, dtype) for stored_as, count in counts.items())]


def _shapes(source: Source, stored: Mapping[str, StoredFormat], specs: Mapping[str, Specs]) -> dict[str, Shape]:
    """Shape [O, I] of each quantized module."""
    shapes: dict[str, Shape] = {}
    missing: list[str] = []
    for module, format in stored.items():
        try:
            shapes[module] = format.shape(specs[module])
        except KeyError as error:
            missing.append(source.origin(f"{module}.{error.args[0]}").key)
        except ValueError as error:
            key = source.origin(f"{module}.weight_scale").key.rpartition(".")[0]
            raise CheckpointError(f"{key} is stored in {format} and {error}; fetch it again") from None
    if missing:
        raise CheckpointError("of quantized matrices some parts are missing; fetch them again", missing)
    return shapes


def _natives(
    names: Collection[str], stored: Mapping[str, StoredFormat], specs: Mapping[str, Specs]
) -> dict[str, WeightFormat | None]:
    """The format of each quantized module; None for those that are dequantized."""
    natives = {
        module: None if module.endswith(_NEVER_QUANTIZED) else format.native(specs[module])
        for module, format in stored.items()
    }
    layers: dict[str, dict[bool, set[WeightFormat | None]]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            layer = layers.setdefault(match["path"], {True: set(), False: set()})
            native = natives.get(module := name.rpartition(".")[0])
            if native is not None and native.order is not None:
                native = natives[module] = None
            layer[match["matrix"] == "down"].add(native)
    for path, formats in layers.items():
        kinds = {format and format.kind for matrices in formats.values() for format in matrices}
        if len(kinds) > 1 or any(len(matrices) > 1 for matrices in formats.values()):
            natives |= {module: None for module in natives if module.startswith(f"{path}.")}
    return natives


def _why_dequantized(module: str, native: WeightFormat | None) -> str:
    if module.endswith(_NEVER_QUANTIZED):
        return "and here routers and embeddings are not quantized"
    if native is None:
        return "for which there are no kernels here"
    if native.order is not None:
        return "and stacked experts have no orders of their own"
    return "and others of the same layer's experts are not"


def _note(format: str, why: str, count: int, dtype: torch.dtype) -> str:
    matrices, target = "matrices are" if count > 1 else "matrix is", str(dtype).removeprefix("torch.")
    return f"{count} {matrices} stored in {format}, {why}: dequantized to {target}"


def _native(
    module: str, format: StoredFormat, specs: Specs, shape: Shape, native: WeightFormat
) -> dict[str, str | Computed]:
    """The parts of a matrix in a format that is run: tensors of the file, if they need no change."""
    tensors: dict[str, str | Computed] = {}
    for part, origins in format.native_parts(native, specs).items():
        spec, found = native.part_specs(shape)[part], specs[origins[0]]
        places = {origin: f"{module}.{origin}" for origin in origins}
        if found.dtype.is_floating_point and part != native.parts[0]:
            spec = spec._replace(dtype=found.dtype)  # of scales, it is the file's

        def compute(parts: Mapping[str, Tensor], part: str = part) -> Tensor:
            return format.to_native(native, part, parts, shape)

        is_same = spec == found and len(origins) == 1 and not format.is_in_out and native.order is None
        tensors[f"{module}.{part}"] = places[origins[0]] if is_same else Computed(places, *spec, compute)
    return tensors


def _dequantized(
    module: str, format: StoredFormat, specs: Specs, shape: Shape, dtype: torch.dtype
) -> dict[str, str | Computed]:
    """A matrix in a float dtype, of which a few rows at a time are in float32."""

    def compute(parts: Mapping[str, Tensor]) -> Tensor:
        whole = memory.empty(shape, dtype)
        for at in track(range(0, len(whole), ROWS)):
            whole[at : at + ROWS] = format.dequantize(parts, slice(at, min(at + ROWS, len(whole))))
        return whole

    return {f"{module}.weight": Computed({part: f"{module}.{part}" for part in specs}, shape, dtype, compute)}
