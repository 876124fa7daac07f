"""A checkpoint seen through a plan: the same weights, in few bits, each computed when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.quantization.modules import PACKED
from llama4.quantization.schemes import PLAIN, Format, Plan, make_plan
from llama4.weights import memory
from llama4.weights.names import MULTIMODAL, Names
from llama4.weights.source import SafetensorsSource, Source


class QuantizingSource:
    """An unquantised checkpoint, with the parts of packed weights in place of what a plan quantises.

    Keys are the model's names; the parts of `name.weight` are `name.weight_packed`, ..., those of experts
    `experts.gate_up_proj.weight_packed`, ... One matrix is worked on at a time; nothing is kept but the parts of the
    last one.
    """

    names: Names = MULTIMODAL

    def __init__(self, source: Source, plan: Plan) -> None:
        self._source = source
        self.plan = plan
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self._keys: dict[str, tuple[str, str | None]] = {}  # name -> key in the source, part
        self._parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for key in source.keys():  # noqa: SIM118 (a Source is no dict)
            name = source.names.to_model(key) or key
            if name not in plan:
                self._keys[name] = (key, None)
                continue
            shape = source.shape(key)
            out_in = (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
            parts = PACKED[plan[name].kind].part_shapes(plan[name], out_in)
            for part, (part_shape, dtype) in parts.items():
                stored = f"{name.removesuffix('.weight')}.{part}"
                self._keys[stored] = (key, part)
                self._parts[stored] = part_shape, source.dtype(key) if part == "weight_scale" else dtype

    def keys(self) -> Iterable[str]:
        return self._keys.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._parts[key][0] if key in self._parts else self._source.shape(self._keys[key][0])

    def dtype(self, key: str) -> torch.dtype:
        return self._parts[key][1] if key in self._parts else self._source.dtype(self._keys[key][0])

    def tensor(self, key: str) -> Tensor:
        old, part = self._keys[key]
        if part is None:
            return self._source.tensor(old)
        if self._last[0] != old:
            self._last = ("", {})
            self._last = (old, self._quantized(old))
        return self._last[1][part]

    def is_map(self, key: str) -> bool:
        """Whether a tensor is a part of a file's memory map."""
        old, part = self._keys[key]
        return part is None and isinstance(self._source, SafetensorsSource) and self._source.is_map(old)

    def rounded(self, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        """The parts of a matrix."""
        return PACKED[format.kind].quantize(weight_OI, format)

    def _quantized(self, key: str) -> dict[str, Tensor]:
        format, tensor = self.plan[self._source.names.to_model(key) or key], self._source.tensor(key)
        whole: dict[str, Tensor] = {}
        if tensor.ndim == 2:
            whole = self.rounded(tensor, format)
        for i, expert in enumerate(tensor if tensor.ndim == 3 else ()):  # in x out
            for part, values in self.rounded(expert.mT, format).items():
                if i == 0:
                    whole[part] = values.new_empty(len(tensor), *values.shape)
                whole[part][i] = values
        if isinstance(self._source, SafetensorsSource):
            memory.release(tensor)
        return whole


def quantized(source: Source, scheme: str, *, head: bool = False) -> QuantizingSource:
    """A checkpoint through the plan of a scheme.

    Raises:
        ValueError: see `make_plan`.
        CheckpointError: it is quantised already.
    """
    if source.plan:
        kinds = sorted({format.kind for format in source.plan.values()} - {PLAIN.kind})
        raise CheckpointError(
            f"the checkpoint is quantised already ({', '.join(kinds)}); load it without quantization={scheme!r}, or "
            "quantise its bf16 original"
        )
    shapes = {source.names.to_model(key) or key: source.shape(key) for key in source.keys()}  # noqa: SIM118
    return QuantizingSource(source, make_plan(scheme, shapes, head=head))
