"""What is stored in a way that no format of this library computes with: dequantized, matrix by matrix, when it is read.

It is said once, when a checkpoint is opened. What comes of it is copied into memory, as `load` checks that it can be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llama4.quantization.weight import Shape, TensorSpec
from llama4.weights.source import Origin, Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dequantized:
    """A tensor that is computed from others.

    Attributes:
        parts: what they are to `compute`, and their names.
        shape: of the result.
        compute: from the parts, as they are in the file; its result is rounded to `dtype`.
        dtype: of the result.
    """

    parts: Mapping[str, str]
    shape: Shape
    compute: Callable[[Mapping[str, Tensor]], Tensor]
    dtype: torch.dtype = torch.bfloat16


class DequantizedSource:
    """A checkpoint with dequantized tensors in the place of those that they are computed from.

    Args:
        source: the checkpoint.
        tensors: name here -> how it is computed.
        about: how they are stored, in words.
    """

    def __init__(self, source: Source, tensors: Mapping[str, Dequantized], about: str) -> None:
        self._source = source
        self._tensors = tensors
        self.plan = source.plan
        used = {name for tensor in tensors.values() for name in tensor.parts.values()}
        self._kept = {name: None for name in source.names() if name not in used and name not in tensors}
        if tensors:
            dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
            _say_once(f"{about}: {len(tensors)} tensors are dequantized to {' and '.join(sorted(dtypes))}")

    def names(self) -> Collection[str]:
        return [*self._kept, *self._tensors]

    def spec(self, name: str) -> TensorSpec:
        if name in self._tensors:
            return TensorSpec(self._tensors[name].shape, self._tensors[name].dtype)
        return self._source.spec(name)

    def read(self, name: str) -> Tensor:
        if name not in self._tensors:
            return self._source.read(name)
        tensor = self._tensors[name]
        return tensor.compute({part: self._source.read(at) for part, at in tensor.parts.items()}).to(tensor.dtype)

    def is_mapped(self, name: str) -> bool:
        return name not in self._tensors and self._source.is_mapped(name)

    def origin(self, name: str) -> Origin:
        if name in self._tensors:
            return self._source.origin(next(iter(self._tensors[name].parts.values())))
        return self._source.origin(name)


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)
