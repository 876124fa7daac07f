"""Checkpoints that bitsandbytes quantized to four bits, NF4, and the way back.

Beside `q_proj.weight` there are `q_proj.weight.absmax`, `.quant_map` and others, and bitsandbytes' description of the
matrix, JSON in bytes, `.quant_state.bitsandbytes__nf4`. Experts are seen in three forms: three Linears each,
`experts.7.gate_proj.weight`, out x in, as transformers has them; those of a layer one below the other, in x out,
`experts.gate_proj.weight`; and as the model has them, `experts.gate_up_proj`. Each keeps its form, on disk and in the
model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.families.names import NameTable
from llama4.quantization.nf4 import Nf4
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import QuantizedWeight, Shape, TensorSpec, WeightFormat
from llama4.weights.quant_method import QuantMethod
from llama4.weights.source import Origin, Source, View

_STATE = ".quant_state.bitsandbytes__"
_ROUTER = ".router.weight"
_SKIPPED = "llm_int8_skip_modules"
"""Where a configuration lists what is not quantized, whatever the kind."""
_STORAGE = "bnb_4bit_quant_storage"
"""Where it says as what dtype the bytes of quantized values lie in the files."""
_STACK = re.compile(r".*\.experts\.(gate_up|gate|up|down)_proj")
_EXPERT = re.compile(r".*\.experts\.\d+\.(gate|up|down)_proj\.weight")


class Bitsandbytes(QuantMethod):
    """NF4, with scales quantized again or not."""

    name = "bitsandbytes"
    stacks_experts = False

    def check(self, content: Mapping[str, Any]) -> None:
        is_int8 = content.get("load_in_8bit") or content.get("_load_in_8bit")
        kind = "LLM.int8" if is_int8 else content.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
        if kind != Nf4.kind:
            raise CheckpointError(
                f"the checkpoint is quantized by bitsandbytes as {kind!r}, which this library does not run; take one "
                f"in {Nf4.kind!r}, or in bf16"
            )

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        return BitsandbytesSource(BytesSource(source), table)

    def writes(self, plan: QuantizationPlan) -> bool:
        return all(format is None or isinstance(format, Nf4) for format in plan.values())

    def encode(
        self, source: Source, content: Mapping[str, Any] | None, table: NameTable
    ) -> tuple[Source, Mapping[str, Any] | None]:
        if content and _STORAGE in content:
            content = {**content, _STORAGE: "uint8"}
        return WrittenSource(source), content and _without_moved(content, source, table)


def _without_moved(content: Mapping[str, Any], source: Source, table: NameTable) -> Mapping[str, Any]:
    """The configuration, with the matrices in it that were dequantized as their rows have another order."""
    moved = {
        name.removesuffix(".weight")
        for name in source.names()
        if name.endswith(".weight") and name not in source.plan and table.transform(name)
    }
    if not moved:
        return content
    skipped = {
        *(content.get(_SKIPPED) or ("lm_head",)),
        *(table.to_file(name) or name for name in moved),
    }
    return {**content, _SKIPPED: sorted(skipped)}


class BytesSource(View):
    """Such a checkpoint with quantized values as bytes, whatever dtype they are stored as."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._packed = {name.partition(_STATE)[0] for name in source.names() if _STATE in name}

    def spec(self, name: str) -> TensorSpec:
        spec = super().spec(name)
        return TensorSpec((spec.nbytes, 1), torch.uint8) if name in self._packed else spec

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor.reshape(-1).view(torch.uint8)[:, None] if name in self._packed else tensor


class BitsandbytesSource:
    """Such a checkpoint as parts of packed weights. Which weights are quantized, the keys say.

    A router that is quantized, as older versions of transformers did, is dequantized; so is a matrix whose rows have
    another order in the files than in the model (q and k of Llama 1 to 3): scales that are quantized themselves reach
    over many rows.

    Raises:
        CheckpointError: a kind that is not run, or parts that are missing, of another shape or of another dtype.
    """

    def __init__(self, source: Source, table: NameTable) -> None:
        self._source = source
        self.notes = source.notes
        self._names: dict[str, str] = {}
        self._dequantized: dict[str, Nf4] = {}
        self.plan: dict[str, WeightFormat | None] = {}
        names = source.names()
        formats = {name.partition(_STATE)[0]: self._format(name) for name in names if _STATE in name}
        self._check_parts(formats)
        for name in names:
            weight, part = (name, "weight") if name in formats else name.rpartition(".")[::2]
            if _STATE in name:
                continue
            if weight not in formats:
                self._names[name] = name
                if _EXPERT.fullmatch(name):
                    self.plan[name] = None
            elif weight.endswith(_ROUTER) or table.transform(weight):
                self._dequantized[weight] = formats[weight]
            else:
                path = weight.removesuffix(".weight")
                self._names[f"{path}.{part}"] = name
                self.plan[path if _STACK.fullmatch(path) else weight] = formats[weight]

    def _format(self, name: str) -> Nf4:
        try:
            return Nf4.read(bytes(self._source.read(name).tolist()).decode())
        except ValueError as error:
            key = self._source.origin(name).key.partition(_STATE)[0]
            raise CheckpointError(f"{key} cannot be loaded: {error}") from error

    def _check_parts(self, formats: Mapping[str, Nf4]) -> None:
        present = set(self._source.names())
        missing, mismatched, unexpected = list[str](), list[tuple[str, Shape, Shape]](), list[str]()
        for weight, format in formats.items():
            for part, wanted in format.part_specs(format.stored).items():
                name = weight if part == "weight" else f"{weight}.{part}"
                key = self._source.origin(name).key
                if name not in present:
                    missing.append(key)
                elif (found := self._source.spec(name)).shape != wanted.shape:
                    mismatched.append((key, found.shape, wanted.shape))
                elif found.dtype != wanted.dtype:
                    unexpected.append(f"{key} in {found.dtype}, wanted {wanted.dtype}")
        if missing or mismatched or unexpected:
            raise CheckpointError(
                "the parts of what bitsandbytes quantized do not fit together; fetch the checkpoint again",
                missing,
                unexpected,
                mismatched,
            )

    def names(self) -> Collection[str]:
        return [*self._names, *self._dequantized]

    def spec(self, name: str) -> TensorSpec:
        if name in self._dequantized:
            return TensorSpec(self._dequantized[name].stored, self._dequantized[name].dtype)
        return self._source.spec(self._names[name])

    def read(self, name: str) -> Tensor:
        if name not in self._dequantized:
            return self._source.read(self._names[name])
        format = self._dequantized[name]
        with torch.device("meta"):
            matrix = QuantizedWeight(format, format.stored)
        names = {part: name if part == "weight" else f"{name}.{part}" for part in matrix.specs}
        matrix.set_parts({part: self._source.read(key) for part, key in names.items()})
        return matrix.dequantize()

    def is_mapped(self, name: str) -> bool:
        return name not in self._dequantized and self._source.is_mapped(self._names[name])

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._names.get(name, name))


class WrittenSource:
    """The way back: NF4 under the keys of bitsandbytes, with its description of each matrix."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.plan, self.notes = source.plan, source.notes
        self._names: dict[str, str] = {}
        self._states: dict[str, Tensor] = {}
        formats = {name.removesuffix(".weight"): format for name, format in source.plan.items()}
        for name in source.names():
            path, _, part = name.rpartition(".")
            format = formats.get(path)
            if not isinstance(format, Nf4) or part == "bias":
                self._names[name] = name
                continue
            weight = path if len(format.stored) == 3 else f"{path}.weight"
            self._names[weight if part == "weight" else f"{weight}.{part}"] = name
            self._states[f"{weight}{_STATE}{Nf4.kind}"] = torch.tensor(list(format.state.encode()), dtype=torch.uint8)

    def names(self) -> Collection[str]:
        return [*self._names, *self._states]

    def spec(self, name: str) -> TensorSpec:
        if name in self._states:
            return TensorSpec(tuple(self._states[name].shape), torch.uint8)
        return self._source.spec(self._names[name])

    def read(self, name: str) -> Tensor:
        return self._states[name] if name in self._states else self._source.read(self._names[name])

    def is_mapped(self, name: str) -> bool:
        return name in self._names and self._source.is_mapped(self._names[name])

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._names.get(name, name))
