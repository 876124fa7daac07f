"""Sources whose tensors are computed from those of another, when they are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import Shape, TensorSpec
from llama4.weights.source import Source, View

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed from others.

    Attributes:
        parts: what they are to `compute`, and their names.
        shape: of the result.
        dtype: of the result.
        compute: from the parts, as they are in the file; what it gives is reshaped and rounded.
    """

    parts: Mapping[str, str]
    shape: Shape
    dtype: torch.dtype
    compute: Callable[[Mapping[str, Tensor]], Tensor]


class ComputedSource(View):
    """Tensors of a checkpoint under other names, and tensors that are computed from them.

    Args:
        source: the checkpoint.
        tensors: name here -> name there, or how it is computed.
        plan: see `Source.plan`.
    """

    def __init__(self, source: Source, tensors: Mapping[str, str | Computed], plan: QuantizationPlan) -> None:
        first = {name: at if isinstance(at, str) else next(iter(at.parts.values())) for name, at in tensors.items()}
        super().__init__(source, first, plan)
        self._computed = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Computed)}

    def spec(self, name: str) -> TensorSpec:
        if name not in self._computed:
            return super().spec(name)
        return TensorSpec(self._computed[name].shape, self._computed[name].dtype)

    def read(self, name: str) -> Tensor:
        if name not in self._computed:
            return super().read(name)
        tensor = self._computed[name]
        result = tensor.compute({part: self._source.read(at) for part, at in tensor.parts.items()})
        return result.reshape(tensor.shape).to(tensor.dtype)

    def is_mapped(self, name: str) -> bool:
        return name not in self._computed and super().is_mapped(name)


class DequantizedSource(ComputedSource):
    """A checkpoint in which what no format of this library computes with is dequantized. That is said once; `load` sees
    that the result fits into memory.

    Args:
        source: the checkpoint.
        tensors: name here -> how it is computed; what is not part of one is shown as it is.
        about: how they are stored, in words.
    """

    def __init__(self, source: Source, tensors: Mapping[str, Computed], about: str) -> None:
        used = {name for tensor in tensors.values() for name in tensor.parts.values()}
        kept = {name: name for name in source.names() if name not in used}
        super().__init__(source, {**kept, **tensors}, source.plan)
        if tensors:
            dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
            _say_once(f"{about}: {len(tensors)} tensors are dequantized to {' and '.join(dtypes)}")


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)
