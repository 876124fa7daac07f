"""A GGUF model's tensors as the model has them: what is computed as it lies stays in the file's memory map."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.progress import track
from llama4.quantization.gguf_blocks import GGUF_FORMATS
from llama4.quantization.weight import ROWS, Shape, WeightFormat
from llama4.weights import memory
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.gguf.files import FLOATS, GgufTensors
from llama4.weights.gguf.names import NAMES
from llama4.weights.source import ModelNames, Source

_EXPERTS = re.compile(r"(?P<path>.*\.experts)\.(?P<matrix>gate|up|down)_proj\.weight")
_MATRICES = ("gate", "up", "down")
_NEVER_QUANTIZED = re.compile(r"(.*\.router|vision_model\..*|multi_modal_projector\..*)\.weight")
"""What the model has in no quantized format."""

Decode = Callable[[Tensor], Tensor]
"""Rows as they are stored -> their weights, in float32 or, if they are floats, as they are."""


def model_source(files: GgufTensors, dtype: torch.dtype) -> Source:
    """The tensors of a model.

    Args:
        dtype: of what is dequantized.

    Raises:
        CheckpointError: experts of which matrices are missing, or a type that cannot be read.
    """
    return _Decoding(files, ModelNames(files, NAMES), dtype).source()


class _Decoding:
    """What becomes of each tensor."""

    def __init__(self, files: GgufTensors, source: Source, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self._stored = {name: files.tensor(source.origin(name).key) for name in source.names()}
        self._tensors: dict[str, str | Computed] = {}
        self._plan: dict[str, WeightFormat] = {}
        self._dequantized: Counter[str] = Counter()

    def source(self) -> Source:
        experts: dict[str, dict[str, str]] = {}
        for name in self._stored:
            if match := _EXPERTS.fullmatch(name):
                experts.setdefault(match["path"], {})[match["matrix"]] = name
            else:
                self._matrix(name)
        for path, names in experts.items():
            self._experts(path, names)
        result = ComputedSource(self._source, self._tensors, self._plan)
        target = str(self._dtype).removeprefix("torch.")
        result.notes = [
            f"{count} {'tensors are' if count > 1 else 'tensor is'} stored in {kind}: dequantized to {target}"
            for kind, count in self._dequantized.items()
        ]
        return result

    def _kind(self, name: str) -> str:
        return self._stored[name].type.name

    def _matrix(self, name: str) -> None:
        kind, shape = self._kind(name), self._stored[name].shape
        if kind in FLOATS:
            self._tensors[name] = name
        elif kind in GGUF_FORMATS and len(shape) == 2 and not _NEVER_QUANTIZED.fullmatch(name):
            self._tensors[name] = name
            self._plan[name] = GGUF_FORMATS[kind]
        else:
            self._tensors[name] = self._decoded({"stored": name}, shape, lambda parts: parts["stored"])

    def _experts(self, path: str, names: Mapping[str, str]) -> None:
        """The experts of a layer: three stacks of packed matrices, or gate and up side by side, in x out."""
        wanted = {matrix: f"{path}.{matrix}_proj.weight" for matrix in _MATRICES}
        if missing := [self._source.origin(name).key for matrix, name in wanted.items() if matrix not in names]:
            raise CheckpointError(f"of the experts of {path} some matrices are missing; fetch the model again", missing)
        shapes = {matrix: self._stored[name].shape for matrix, name in wanted.items()}
        E, F, D = (*shapes["gate"], 0, 0)[:3]
        if shapes != {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}:
            raise CheckpointError(f"the experts of {path} have shapes {shapes}, which do not fit together")
        if all(self._kind(name) in GGUF_FORMATS for name in wanted.values()):
            for name in wanted.values():
                self._tensors[name] = name
                self._plan[name.removesuffix(".weight")] = GGUF_FORMATS[self._kind(name)]
            return
        gate_up = {matrix: wanted[matrix] for matrix in ("gate", "up")}
        self._tensors[f"{path}.gate_up_proj"] = self._decoded(
            gate_up, (E, D, 2 * F), lambda parts: torch.cat((parts["gate"], parts["up"]), dim=-2).mT
        )
        self._tensors[f"{path}.down_proj"] = self._decoded(
            {"down": wanted["down"]}, (E, F, D), lambda parts: parts["down"].mT
        )

    def _decoded(
        self, names: Mapping[str, str], shape: Shape, arrange: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> Computed:
        """A tensor made of some, which are decoded a few rows, or one expert, at a time."""
        kinds = {part: self._kind(name) for part, name in names.items()}
        decoders = {part: decoder(kind) for part, kind in kinds.items()}
        self._dequantized.update(kind for kind in kinds.values() if kind not in FLOATS)
        floats = {FLOATS.get(kind, self._dtype) for kind in kinds.values()}
        dtype = floats.pop() if len(floats) == 1 else self._dtype

        def compute(parts: Mapping[str, Tensor]) -> Tensor:
            whole = memory.empty(shape, dtype)
            rows = 1 if len(shape) > 2 else ROWS
            for at in track(range(0, len(whole), rows)):
                some = {part: decoders[part](stored[at : at + rows]) for part, stored in parts.items()}
                whole[at : at + rows] = arrange(some)
            return whole

        return Computed(names, shape, dtype, compute)


def decoder(kind: str) -> Decode:
    """How rows of a type become numbers; of types that are not computed as they lie, by the package `gguf`.

    Raises:
        CheckpointError: that package is not installed.
    """
    if kind in FLOATS:
        return lambda stored: stored
    if kind in GGUF_FORMATS:
        return GGUF_FORMATS[kind].decode
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError:
        raise CheckpointError(
            f"the file has tensors in {kind}, which the package gguf decodes, and it is not installed; run "
            "`pip install gguf`"
        ) from None
    return lambda stored: torch.from_numpy(dequantize(stored.numpy(), GGMLQuantizationType[kind]))
