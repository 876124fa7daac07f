"""Checkpoints that bitsandbytes quantised to four bits, NF4, and the way back.

Beside `q_proj.weight` there stand `q_proj.weight.absmax`, `.quant_map` and others, and what bitsandbytes says of it as
JSON in bytes, `.quant_state.bitsandbytes__nf4`. Experts are seen in three forms: three Linears each,
`experts.7.gate_proj.weight`, out x in, as transformers has them; those of a layer one below the other, in x out,
`experts.gate_proj.weight`; and as the model has them, `experts.gate_up_proj`. Each stays as it is, on disk and in the
model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llama4.errors import CheckpointError
from llama4.quantization.nf4 import KIND, Nf4Format, Nf4Weight
from llama4.quantization.schemes import PLAIN, Format
from llama4.weights.names import MULTIMODAL, IdentityNames, Names
from llama4.weights.source import Source

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_ROUTER = ".router.weight"
_STACK = re.compile(r".*\.experts\.(gate_up|gate|up|down)_proj")
_EXPERT = re.compile(r".*\.experts\.\d+\.(gate|up|down)_proj\.weight")


def check_method(content: Mapping[str, Any]) -> None:
    """See that a `quantization_config` is of a kind that is run.

    Raises:
        CheckpointError: it is not; with its name.
    """
    is_int8 = content.get("load_in_8bit") or content.get("_load_in_8bit")
    kind = "LLM.int8" if is_int8 else content.get("bnb_4bit_quant_type", "fp4")  # as bitsandbytes has it by default
    storage = content.get("bnb_4bit_quant_storage", "uint8")
    if kind != KIND or storage != "uint8":
        raise CheckpointError(
            f"the checkpoint is quantised by bitsandbytes as {kind!r}, stored in {storage}, which this library does "
            f"not run; take one in {KIND!r}, stored in uint8, or in bf16"
        )


class BitsandbytesSource:
    """Such a checkpoint under the model's names. Which weights are quantised, the keys say.

    A router that is quantised, as older versions of transformers did, is dequantised.

    Raises:
        CheckpointError: a kind that is not run, or parts that are missing, of another shape or of another dtype.
    """

    names: Names = MULTIMODAL

    def __init__(self, source: Source) -> None:
        self._source = source
        self._keys: dict[str, str] = {}
        self._routers: dict[str, tuple[str, Nf4Format]] = {}
        self.plan: dict[str, Format] = {}
        named = {source.names.to_model(key) or key: key for key in source.keys()}  # noqa: SIM118 (a Source is no dict)
        formats = {name.partition(_STATE)[0]: self._format(key) for name, key in named.items() if _STATE in name}
        self._check_parts(named, formats)
        for name, key in named.items():
            weight, part = (name, "weight") if name in formats else name.rpartition(".")[::2]
            if _STATE in name:
                continue
            if weight not in formats:
                self._keys[name] = key
                if _EXPERT.fullmatch(name):
                    self.plan[name] = PLAIN
            elif weight.endswith(_ROUTER):
                self._routers[weight] = named[weight], formats[weight]
            else:
                path = weight.removesuffix(".weight")
                self._keys[f"{path}.{part}"] = key
                self.plan[path if _STACK.fullmatch(path) else weight] = formats[weight]

    def _format(self, key: str) -> Nf4Format:
        try:
            return Nf4Format.read(bytes(self._source.tensor(key).tolist()).decode())
        except ValueError as error:
            raise CheckpointError(f"{key.partition(_STATE)[0]} cannot be loaded: {error}") from error

    def _check_parts(self, named: Mapping[str, str], formats: Mapping[str, Nf4Format]) -> None:
        missing, mismatched, unexpected = list[str](), list[tuple[str, tuple[int, ...], tuple[int, ...]]](), list[str]()
        for weight, format in formats.items():
            for part, (shape, dtype) in Nf4Weight.part_shapes(format, format.stored).items():
                name = weight if part == "weight" else f"{weight}.{part}"
                if name not in named:
                    missing.append(self._source.names.to_file(name) or name)
                elif (found := self._source.shape(named[name])) != shape:
                    mismatched.append((named[name], found, shape))
                elif (other := self._source.dtype(named[name])) != dtype:
                    unexpected.append(f"{named[name]} in {other}, wanted {dtype}")
        if missing or mismatched or unexpected:
            raise CheckpointError(
                "the parts of what bitsandbytes quantised do not fit together; fetch the checkpoint again",
                missing,
                unexpected,
                mismatched,
            )

    def _dequantised(self, key: str, format: Nf4Format) -> Tensor:
        matrix = Nf4Weight(format, format.stored)
        for part in Nf4Weight.part_shapes(format, format.stored):
            values = self._source.tensor(key if part == "weight" else f"{key}.{part}")
            setattr(matrix, part, nn.Parameter(values, requires_grad=False))
        return matrix.dequantize()

    def keys(self) -> Iterable[str]:
        return [*self._keys, *self._routers]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._routers[key][1].stored if key in self._routers else self._source.shape(self._keys[key])

    def dtype(self, key: str) -> torch.dtype:
        return self._routers[key][1].dtype if key in self._routers else self._source.dtype(self._keys[key])

    def tensor(self, key: str) -> Tensor:
        if key in self._routers:
            return self._dequantised(*self._routers[key])
        return self._source.tensor(self._keys[key])


class WrittenSource:
    """The way back: a model, or a checkpoint, in NF4 under the keys of bitsandbytes, with what that says of each."""

    names: Names = IdentityNames()

    def __init__(self, source: Source) -> None:
        self._source = source
        self.plan = source.plan
        self._keys: dict[str, str] = {}
        self._states: dict[str, Tensor] = {}
        formats = {name.removesuffix(".weight"): format for name, format in source.plan.items()}
        for key in source.keys():  # noqa: SIM118 (a Source is no dict)
            name = source.names.to_model(key) or key
            path, _, part = name.rpartition(".")
            format = formats.get(path)
            if not isinstance(format, Nf4Format) or part == "bias":
                self._keys[name] = key
                continue
            weight = path if len(format.stored) == 3 else f"{path}.weight"
            self._keys[weight if part == "weight" else f"{weight}.{part}"] = key
            self._states[f"{weight}{_STATE}{KIND}"] = torch.tensor(list(format.state.encode()), dtype=torch.uint8)

    def keys(self) -> Iterable[str]:
        return [*self._keys, *self._states]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._states[key].shape) if key in self._states else self._source.shape(self._keys[key])

    def dtype(self, key: str) -> torch.dtype:
        return torch.uint8 if key in self._states else self._source.dtype(self._keys[key])

    def tensor(self, key: str) -> Tensor:
        return self._states[key] if key in self._states else self._source.tensor(self._keys[key])
