"""A model's parameters as a `Source`."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from llama4.quantization.weight import QuantizedWeight, TensorSpec, WeightFormat
from llama4.weights.source import Origin


class ModelSource:
    """The parameters of a model, tied ones once, in the dtype that they have; packed weights as in a checkpoint.

    Args:
        narrow: a dtype in which float32 parameters are given instead, if it holds every number of them.
    """

    notes = ()

    def __init__(self, model: nn.Module, narrow: torch.dtype | None = None) -> None:
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._parts: dict[str, tuple[QuantizedWeight, str]] = {}
        self.plan: dict[str, WeightFormat] = {}
        for path, module in model.named_modules():
            if isinstance(module, QuantizedWeight):
                self.plan[f"{path}.weight" if len(module.shape) == 2 else path] = module.format
                self._parts |= {f"{path}.{part}": (module, part) for part in module.specs}
        wide = {name: t for name, t in self._tensors.items() if name not in self._parts and t.dtype == torch.float32}
        if narrow is not None and all(torch.equal(t.to(narrow).float(), t) for t in wide.values()):
            self._tensors |= {name: tensor.to(narrow) for name, tensor in wide.items()}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def spec(self, name: str) -> TensorSpec:
        tensor = self._tensors[name]
        dtype = tensor.dtype
        if name in self._parts:
            module, part = self._parts[name]
            dtype = module.checkpoint_dtype(part)
        return TensorSpec(tuple(tensor.shape), dtype)

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._tensors[name]
        module, part = self._parts[name]
        return module.checkpoint_layout(part)

    def first_rows(self, name: str) -> Tensor:
        """Of what `read` gives, 16 rows of the first matrix at most, or as many numbers of a vector."""
        tensor = torch.atleast_1d(self._tensors[name])
        rows = tensor[(0,) * (tensor.ndim - 2)][:16]
        if name not in self._parts:
            return rows
        module, part = self._parts[name]
        return module.to_checkpoint_layout(part, rows)

    def is_mapped(self, name: str) -> bool:
        return False

    def origin(self, name: str) -> Origin:
        return Origin(name)
