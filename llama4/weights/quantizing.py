"""Quantization of a checkpoint while it is read: each matrix when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from torch import Tensor

from llama4.errors import CheckpointError
from llama4.progress import track
from llama4.quantization.plan import PARTS, make_plan, out_in
from llama4.quantization.weight import TensorSpec, WeightFormat
from llama4.weights import memory
from llama4.weights.source import Origin, Source

Quantizer: TypeAlias = Callable[[Tensor, WeightFormat], dict[str, Tensor]]


class QuantizingSource:
    """An unquantized checkpoint, with the parts of packed weights in place of what a plan quantizes.

    The parts of `q_proj.weight` are `q_proj.weight_packed`, ..., those of `experts.gate_up_proj` are
    `experts.gate_up_proj.weight_packed`, ... Only the parts of the matrix that was read last are kept.

    Args:
        source: the checkpoint.
        plan: the formats of what is quantized.
        quantizer: computes the parts of a matrix [O, I]; by default as its format does.
    """

    def __init__(self, source: Source, plan: Mapping[str, WeightFormat], quantizer: Quantizer | None = None) -> None:
        self._source = source
        self.plan, self.notes = plan, source.notes
        self._quantize = quantizer or (lambda weight_OI, format: format.quantize(weight_OI))
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self._tensors: dict[str, tuple[str, str | None, TensorSpec]] = {}  # name -> parameter, part
        for name in source.names():
            spec = source.spec(name)
            if name not in plan:
                self._tensors[name] = name, None, spec
                continue
            for part, part_spec in plan[name].part_specs(out_in(spec.shape)).items():
                dtype = spec.dtype if part == "weight_scale" else part_spec.dtype
                self._tensors[f"{name.removesuffix('.weight')}.{part}"] = name, part, TensorSpec(part_spec.shape, dtype)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def spec(self, name: str) -> TensorSpec:
        return self._tensors[name][2]

    def read(self, name: str) -> Tensor:
        parameter, part, _ = self._tensors[name]
        if part is None:
            return self._source.read(parameter)
        if self._last[0] != parameter:
            self._last = ("", {})
            self._last = (parameter, self._quantized(parameter))
        return self._last[1][part]

    def is_mapped(self, name: str) -> bool:
        parameter, part, _ = self._tensors[name]
        return part is None and self._source.is_mapped(parameter)

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._tensors[name][0] if name in self._tensors else name)

    def _quantized(self, name: str) -> dict[str, Tensor]:
        format, tensor = self.plan[name], self._source.read(name)
        assert format is not None
        if tensor.ndim == 2:
            parts = self._quantize(tensor, format)
        else:
            parts = {}
            for i, expert_IO in enumerate(track(tensor.unbind())):
                for part, values in self._quantize(expert_IO.mT, format).items():
                    if i == 0:
                        parts[part] = values.new_empty(len(tensor), *values.shape)
                    parts[part][i] = values
        if self._source.is_mapped(name):
            memory.release(tensor)
        return parts


def quantized(source: Source, scheme: str, *, head: bool = False, parts: Mapping[str, str] = PARTS) -> QuantizingSource:
    """A checkpoint through the plan of a scheme.

    Raises:
        Llama4Error: see `make_plan`.
        CheckpointError: it is quantized already.
    """
    if source.plan:
        kinds = sorted({format.kind for format in source.plan.values() if format is not None})
        raise CheckpointError(
            f"the checkpoint is quantized already ({', '.join(kinds)}); load it without quantization={scheme!r}, or "
            "quantize its bf16 original"
        )
    shapes = {name: source.spec(name).shape for name in source.names()}
    return QuantizingSource(source, make_plan(scheme, shapes, head=head, parts=parts))
