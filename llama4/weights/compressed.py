"""The compressed-tensors format: what llm-compressor writes, and vLLM and transformers read.

There every expert is three Linears of its own, `experts.7.gate_proj.weight_packed`, ..., out x in. In the model the
experts of a layer are stacked, gate over up. `CompressedSource` reads the one as the other; `ExpandedSource` is the way
back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.quantization.schemes import Format
from llama4.weights import memory
from llama4.weights.names import MULTIMODAL, IdentityNames, Names
from llama4.weights.source import Source

METHOD = "compressed-tensors"
_EXPERT = re.compile(
    r"(?P<path>.*\.feed_forward\.experts)\.(?P<index>\d+)\.(?P<matrix>gate|up|down)_proj\.(?P<part>\w+)"
)
_STACK = re.compile(r"(?P<path>.*\.feed_forward\.experts)\.(?P<matrix>gate_up|down)_proj(\.(?P<part>\w+))?")
_EXTRAS = ("weight_zero_point", "weight_g_idx")


# -- reading -------------------------------------------------------------------------------------------------------


def read_groups(content: Mapping[str, Any]) -> list[tuple[list[str], Format]]:
    """The groups of a `quantization_config`: which modules each is for, and its format.

    Raises:
        CheckpointError: a format that this library does not run, with the fields that say so.
    """
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups: the configuration is damaged; fetch it again")
    return [(list(group.get("targets") or ["Linear"]), _read_format(name, group)) for name, group in groups.items()]


def _read_format(name: str, group: Mapping[str, Any]) -> Format:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    size = weights.get("group_size") if strategy == "group" else None
    per_token = inputs is not None and inputs.get("type") == "float" and inputs.get("dynamic") is True
    per_token = per_token and inputs is not None and inputs.get("strategy") == "token"
    plain = weights.get("symmetric", True) and not weights.get("dynamic") and group.get("output_activations") is None
    plain = plain and weights.get("actorder") not in ("group", "dynamic", True)
    match kind, bits, strategy:
        case "float", 8, "channel" | "group" if plain and per_token:
            return Format("fp8", size)
        case "int", 8, "channel" if plain and inputs is None:
            return Format("int8")
        case "int", 4, "group" if plain and inputs is None and size in (32, 64, 128, 256):
            return Format("int4", size)
    found = {"type": kind, "num_bits": bits, "strategy": strategy, "group_size": weights.get("group_size")}
    found |= {key: weights[key] for key in ("symmetric", "dynamic", "actorder") if weights.get(key) is not None}
    raise CheckpointError(
        f"the checkpoint is quantised in a way that this library does not run: weights of {name} are {found}, inputs "
        f"{'quantised' if inputs is not None else 'not'}. It runs int4 (symmetric groups of 32 to 256) and int8 (per "
        "channel) for weights alone, and fp8 (per channel) with inputs quantised per token; take one of those, or bf16"
    )


@dataclass(frozen=True)
class _Stack:
    """Keys in the file: expert by expert, and of each what lies one below the other."""

    keys: tuple[tuple[str, ...], ...]
    in_out: bool
    """Whether the model has the experts in x out: those that are not quantised."""


class CompressedSource:
    """A checkpoint of the compressed-tensors format under the model's names: experts stacked, one tensor at a time.

    Which weights are quantised the keys say; how, the groups of the configuration.

    Args:
        source: the files.
        content: `quantization_config` of the configuration.

    Raises:
        CheckpointError: a format that cannot be run, or experts that are not whole or not of one format.
    """

    names: Names = MULTIMODAL

    def __init__(self, source: Source, content: Mapping[str, Any]) -> None:
        self._source = source
        self._groups = read_groups(content)
        self.plan: dict[str, Format] = {}
        self._plain: dict[str, str] = {}
        self._stacks: dict[str, _Stack] = {}
        self._bytes: set[str] = set()
        named = {source.names.to_model(key) or key: key for key in source.keys()}  # noqa: SIM118 (a Source is no dict)
        if extras := [key for name, key in named.items() if name.endswith(_EXTRAS)]:
            raise CheckpointError(
                "the checkpoint has zero points or reordered groups, which this library does not run; take a symmetric "
                "one without activation order, or bf16",
                unexpected=extras,
            )
        experts: dict[str, dict[tuple[str, str], dict[int, str]]] = {}
        formats = {m: self._format_of(m) for name in named if (m := name.removesuffix(".weight_scale")) != name}
        for name, key in named.items():
            module, _, part = name.rpartition(".")
            if part == "weight_shape":
                continue
            if part == "weight_packed" and module in formats and formats[module].kind == "int8":
                self._bytes.add(key)
                part = "weight"
            if match := _EXPERT.fullmatch(f"{module}.{part}"):
                experts.setdefault(match["path"], {}).setdefault((match["matrix"], part), {})[int(match["index"])] = key
                continue
            self._plain[f"{module}.{part}"] = key
            if module in formats:
                self.plan[f"{module}.weight"] = formats[module]
        for path, matrices in experts.items():
            self._stack(path, matrices, formats)

    def _format_of(self, module: str) -> Format:
        """That of the group which names the module, else of the one for all Linears."""
        for targets, format in sorted(self._groups, key=lambda group: "Linear" in group[0]):
            for target in targets:
                pattern = re.compile(target.removeprefix("re:")) if target.startswith("re:") else None
                if target in ("Linear", module) or (pattern is not None and pattern.match(module)):
                    return format
        raise CheckpointError(f"{module} is quantised, but no group of quantization_config is for it; fetch both again")

    def _stack(self, path: str, matrices: dict[tuple[str, str], dict[int, str]], formats: Mapping[str, Format]) -> None:
        count = 1 + max(index for keys in matrices.values() for index in keys)
        parts = sorted({part for _, part in matrices})
        wanted = [(i, matrix, part) for i in range(count) for matrix in ("gate", "up", "down") for part in parts]
        if missing := [f"{path}.{i}.{m}_proj.{part}" for i, m, part in wanted if i not in matrices.get((m, part), {})]:
            raise CheckpointError(f"of the {count} experts of {path} some parts are missing; fetch them again", missing)
        gate_up_formats, down_formats = (
            {formats.get(f"{path}.{i}.{matrix}_proj") for i in range(count) for matrix in matrices_of}
            for matrices_of in (("gate", "up"), ("down",))
        )
        both_formats = gate_up_formats | down_formats
        if len(gate_up_formats) > 1 or len(down_formats) > 1 or len({of and of.kind for of in both_formats}) > 1:
            raise CheckpointError(
                f"the experts of {path} are in several formats, {both_formats}; those of a layer must share one"
            )
        (gate_up_format,), (down_format,) = gate_up_formats, down_formats
        for part in parts:
            suffix = f".{part}" if gate_up_format is not None else ""
            gate, up, down = (matrices[matrix, part] for matrix in ("gate", "up", "down"))
            both = tuple((gate[i], up[i]) for i in range(count))
            self._stacks[f"{path}.gate_up_proj{suffix}"] = _Stack(both, gate_up_format is None)
            self._stacks[f"{path}.down_proj{suffix}"] = _Stack(
                tuple((down[i],) for i in range(count)), gate_up_format is None
            )
        if gate_up_format is not None and down_format is not None:
            self.plan |= {f"{path}.gate_up_proj": gate_up_format, f"{path}.down_proj": down_format}

    def keys(self) -> Iterable[str]:
        return [*self._plain, *self._stacks]

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._plain:
            return self._shape(self._plain[key])
        stack = self._stacks[key]
        shapes = [self._shape(one) for one in stack.keys[0]]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        return (len(stack.keys), *((columns, rows) if stack.in_out else (rows, columns)))

    def dtype(self, key: str) -> torch.dtype:
        first = self._plain[key] if key in self._plain else self._stacks[key].keys[0][0]
        return torch.int8 if first in self._bytes else self._source.dtype(first)

    def tensor(self, key: str) -> Tensor:
        if key in self._plain:
            return self._read(self._plain[key])
        stack = self._stacks[key]
        whole = memory.empty(self.shape(key), self.dtype(key))
        for expert, keys in zip(whole, stack.keys, strict=True):
            matrix = torch.cat([self._read(one) for one in keys])
            expert.copy_(matrix.mT if stack.in_out else matrix)
        return whole

    def _shape(self, key: str) -> tuple[int, ...]:
        *rows, columns = self._source.shape(key)
        return (*rows, columns * 4) if key in self._bytes else (*rows, columns)

    def _read(self, key: str) -> Tensor:
        tensor = self._source.tensor(key)
        if key not in self._bytes:  # eight bits, each 128 more than it is, four in an int32
            return tensor
        return (tensor.contiguous().view(torch.uint8) ^ 128).view(torch.int8)


# -- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """A part of a stacked tensor: of one expert, some rows of an equal division."""

    name: str
    expert: int
    share: tuple[int, int] = (0, 1)
    in_out: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        matrix = tensor[self.expert].mT if self.in_out else tensor[self.expert]
        index, count = self.share
        return matrix.chunk(count)[index]


class ExpandedSource:
    """What `CompressedSource` puts together, taken apart: every expert's matrices, and the shapes of packed ones.

    Args:
        source: tensors of the model's names, with the parts of packed weights.
    """

    names: Names = IdentityNames()

    def __init__(self, source: Source) -> None:
        self._source = source
        self.plan = source.plan
        self._whole: dict[str, str] = {}
        self._cuts: dict[str, _Cut] = {}
        self._shapes: dict[str, Tensor] = {}
        self._last: tuple[str, Tensor | None] = ("", None)
        for key in source.keys():  # noqa: SIM118 (a Source is no dict)
            name, shape = source.names.to_model(key) or key, source.shape(key)
            match = _STACK.fullmatch(name)
            if match is None:
                self._whole[name] = key
                self._note_shape(name, shape)
                continue
            path, part = match["path"], match["part"] or "weight"
            halves = ("gate", "up") if match["matrix"] == "gate_up" else ("down",)
            for i in range(shape[0]):
                for k, half in enumerate(halves):
                    cut = _Cut(key, i, (k, len(halves)), in_out=match["part"] is None)
                    self._cuts[f"{path}.{i}.{half}_proj.{part}"] = cut
                    self._note_shape(f"{path}.{i}.{half}_proj.{part}", (shape[1] // len(halves), shape[2]))

    def _note_shape(self, name: str, packed: tuple[int, ...]) -> None:
        if name.endswith(".weight_packed"):
            self._shapes[name.removesuffix("packed") + "shape"] = torch.tensor([packed[0], packed[1] * 8])

    def keys(self) -> Iterable[str]:
        return [*self._whole, *self._cuts, *self._shapes]

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._whole:
            return self._source.shape(self._whole[key])
        if key in self._shapes:
            return (2,)
        cut = self._cuts[key]
        _, rows, columns = self._source.shape(cut.name)
        rows, columns = (columns, rows) if cut.in_out else (rows, columns)
        return (rows // cut.share[1], columns)

    def dtype(self, key: str) -> torch.dtype:
        if key in self._shapes:
            return torch.int64
        return self._source.dtype(self._whole[key] if key in self._whole else self._cuts[key].name)

    def tensor(self, key: str) -> Tensor:
        if key in self._whole:
            return self._source.tensor(self._whole[key])
        if key in self._shapes:
            return self._shapes[key]
        cut = self._cuts[key]
        if self._last[0] != cut.name:
            self._last = ("", None)
            self._last = (cut.name, self._source.tensor(cut.name))
        assert self._last[1] is not None
        return cut.of(self._last[1])


_ON_DISK = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
_TOWER = re.compile(r".*(vision_model|multi_modal_projector)\..*")


def quantization_config(source: ExpandedSource) -> dict[str, Any]:
    """What such a checkpoint says of itself in `config.json`."""
    groups: dict[Format, list[str]] = {}
    ignored = set[str]()
    keys = set(source.keys())
    for key in source.keys():  # noqa: SIM118 (a Source is no dict)
        module, _, part = key.rpartition(".")
        if part == "weight_scale":
            match = _EXPERT.fullmatch(key)
            stack = "down" if match and match["matrix"] == "down" else "gate_up"
            format = source.plan[f"{match['path']}.{stack}_proj" if match else f"{module}.weight"]
            groups.setdefault(format, []).append(module)
        elif part == "weight" and f"{key}_scale" not in keys and len(source.shape(key)) == 2:
            ignored.add(_TOWER.sub(r"re:.*\1.*", module))
    only = len(groups) == 1
    return {
        "quant_method": METHOD,
        "format": _ON_DISK[next(iter(groups)).kind] if only else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": group_config(format, ["Linear"] if only else sorted(modules))
            for i, (format, modules) in enumerate(groups.items())
        },
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def group_config(format: Format, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4 if format.kind == "int4" else 8,
        "type": "float" if format.kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "group" if format.group_size else "channel",
        "group_size": format.group_size,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if format.kind == "fp8" else None,
        "output_activations": None,
        "format": _ON_DISK[format.kind],
    }
