"""Sources whose tensors are computed from those of another, when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import Shape, TensorSpec
from llama4.weights.source import Source, View


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed from others.

    Attributes:
        parts: what they are to `compute`, and their names.
        shape: of the result.
        dtype: of the result.
        compute: from the parts, as they are in the file; what it gives is reshaped and rounded. May raise `ValueError`.
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
        try:
            result = tensor.compute({part: self._source.read(at) for part, at in tensor.parts.items()})
        except ValueError as error:
            raise CheckpointError(f"{self.origin(name)} cannot be read: {error}; fetch it again") from error
        return result.reshape(tensor.shape).to(tensor.dtype)

    def is_mapped(self, name: str) -> bool:
        return name not in self._computed and super().is_mapped(name)
