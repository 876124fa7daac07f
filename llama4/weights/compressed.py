"""The compressed-tensors format, which llm-compressor writes and vLLM and transformers read.

In its files every expert is three Linears, `experts.7.gate_proj.weight_packed` and so on, out x in. In the model the
experts of a layer are stacked, gate over up. `CompressedSource` stacks them, `ExpandedSource` takes them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.families.names import HEAD, NameTable
from llama4.quantization.formats import FORMATS
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import Shape, TensorSpec, WeightFormat
from llama4.weights import memory
from llama4.weights.quant_method import QuantMethod
from llama4.weights.source import Origin, Source

_EXPERT = re.compile(
    r"(?P<path>.*\.feed_forward\.experts)\.(?P<index>\d+)\.(?P<matrix>gate|up|down)_proj\.(?P<part>\w+)"
)
_STACK = re.compile(r"(?P<path>.*\.feed_forward\.experts)\.(?P<matrix>gate_up|down)_proj(\.(?P<part>\w+))?")
_TOWER = re.compile(r".*(vision_model|multi_modal_projector)\..*")
_EXTRAS = ("weight_zero_point", "weight_g_idx")

Group = tuple[list[str], WeightFormat]
"""Targets, and their format."""


class CompressedTensors(QuantMethod):
    """Formats that compressed-tensors has a name for."""

    name = "compressed-tensors"

    def check(self, content: Mapping[str, Any]) -> None:
        read_groups(content)

    def open(self, source: Source, content: Mapping[str, Any]) -> Source:
        return CompressedSource(source, read_groups(content))

    def writes(self, plan: QuantizationPlan) -> bool:
        return all(format is not None and format.compressed_name is not None for format in plan.values())

    def encode(
        self, source: Source, content: Mapping[str, Any] | None, table: NameTable
    ) -> tuple[Source, Mapping[str, Any]]:
        expanded = ExpandedSource(source)
        return expanded, quantization_config(expanded, table)


# -- configuration -------------------------------------------------------------------------------------------------


def read_groups(content: Mapping[str, Any]) -> list[Group]:
    """The groups of a `quantization_config`: modules, or patterns of them, in the files' names, and their format.

    Raises:
        CheckpointError: a format that this library does not run, with the fields that say so.
    """
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups: the configuration is damaged; fetch it again")
    return [(list(group.get("targets") or ["Linear"]), _read_format(name, group)) for name, group in groups.items()]


def _read_format(name: str, group: Mapping[str, Any]) -> WeightFormat:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    is_static = weights.get("symmetric", True) and not weights.get("dynamic")
    is_static = is_static and weights.get("actorder") not in ("group", "dynamic", True)
    if is_static and group.get("output_activations") is None:
        for cls in FORMATS.values():
            if (format := cls.from_compressed(weights, inputs)) is not None:
                return format
    found = {key: weights.get(key) for key in ("type", "num_bits", "strategy", "group_size")}
    found |= {key: weights[key] for key in ("symmetric", "dynamic", "actorder") if weights.get(key) is not None}
    known = [cls.compressed_about for cls in FORMATS.values() if cls.compressed_about]
    raise CheckpointError(
        f"the checkpoint is quantized in a way that this library does not run: weights of {name} are {found}, inputs "
        f"{'quantized' if inputs is not None else 'not'}. It runs {', '.join(known[:-1])} and {known[-1]}; take one of "
        "those, or bf16"
    )


def quantization_config(source: ExpandedSource, table: NameTable) -> dict[str, Any]:
    """What such a checkpoint says of itself in `config.json`, in the names of its files."""
    groups: dict[WeightFormat, list[str]] = {}
    for module, format in source.formats.items():
        groups.setdefault(format, []).append(module)
    ignored = {HEAD.removesuffix(".weight")} - source.formats.keys()  # tied to the embeddings it has no key
    for name in source.names():
        module, _, part = name.rpartition(".")
        if part == "weight" and module not in source.formats and len(source.spec(name).shape) == 2:
            ignored.add(module)
    is_one = len(groups) == 1
    return {
        "quant_method": CompressedTensors.name,
        "format": next(iter(groups)).compressed_name if is_one else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": group_config(format, ["Linear"] if is_one else sorted(_in_file(modules, table)))
            for i, (format, modules) in enumerate(groups.items())
        },
        "ignore": sorted({_TOWER.sub(r"re:.*\1.*", module) for module in _in_file(ignored, table)}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _in_file(modules: Collection[str], table: NameTable) -> list[str]:
    return [table.to_file(module) or module for module in modules]


def group_config(format: WeightFormat, targets: list[str]) -> dict[str, Any]:
    """One of the `config_groups`."""
    return {
        "targets": targets,
        **format.to_compressed(),
        "output_activations": None,
        "format": format.compressed_name,
    }


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """Names in the file: of each expert those of the matrices that lie one below the other."""

    names: tuple[tuple[str, ...], ...]
    in_out: bool
    """Whether the model stores the experts in x out: those that are not quantized."""


class CompressedSource:
    """A checkpoint in the compressed-tensors format with experts stacked, one tensor at a time.

    Which weights are quantized the keys say; in which format, the groups of the configuration.

    Args:
        source: the files, under the model's names.
        groups: see `read_groups`.

    Raises:
        CheckpointError: experts of which matrices are missing, or that are not all of one format.
    """

    def __init__(self, source: Source, groups: list[Group]) -> None:
        self._source = source
        self._groups = groups
        self.plan: dict[str, WeightFormat] = {}
        self._single: dict[str, str] = {}
        self._stacks: dict[str, _Stack] = {}
        self._bytes_in_int32: set[str] = set()
        names = source.names()
        if extras := [source.origin(name).key for name in names if name.endswith(_EXTRAS)]:
            raise CheckpointError(
                "the checkpoint has zero points or reordered groups, which this library does not run; take a symmetric "
                "one without activation order, or bf16",
                unexpected=extras,
            )
        modules = [name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")]
        formats = {module: self._format_of(module) for module in modules}
        experts: dict[str, dict[tuple[str, str], dict[int, str]]] = {}
        for name in names:
            module, _, part = name.rpartition(".")
            if part == "weight_shape":
                continue
            if part == "weight_packed" and module in formats and part not in formats[module].parts:
                self._bytes_in_int32.add(name)
                part = "weight"
            if match := _EXPERT.fullmatch(f"{module}.{part}"):
                matrix = experts.setdefault(match["path"], {}).setdefault((match["matrix"], part), {})
                matrix[int(match["index"])] = name
                continue
            self._single[f"{module}.{part}"] = name
            if module in formats:
                self.plan[f"{module}.weight"] = formats[module]
        for path, matrices in experts.items():
            self._stack(path, matrices, formats)

    def _format_of(self, module: str) -> WeightFormat:
        """That of the group which names the module, else of the one for all Linears.

        Targets are written in the names of the files; those of older versions of this library are in the model's.
        """
        in_file = self._source.origin(f"{module}.weight_scale").key.removesuffix(".weight_scale")
        for targets, format in sorted(self._groups, key=lambda group: "Linear" in group[0]):
            for target in targets:
                if target in ("Linear", in_file, module):
                    return format
                pattern = target.removeprefix("re:")
                if pattern != target and (re.match(pattern, in_file) or re.match(pattern, module)):
                    return format
        raise CheckpointError(
            f"{in_file} is quantized, but no group of quantization_config is for it; fetch both again"
        )

    def _stack(
        self, path: str, matrices: dict[tuple[str, str], dict[int, str]], formats: Mapping[str, WeightFormat]
    ) -> None:
        count = 1 + max(index for names in matrices.values() for index in names)
        parts = sorted({part for _, part in matrices})
        wanted = [(i, matrix, part) for i in range(count) for matrix in ("gate", "up", "down") for part in parts]
        if missing := [
            self._source.origin(f"{path}.{i}.{matrix}_proj.{part}").key
            for i, matrix, part in wanted
            if i not in matrices.get((matrix, part), {})
        ]:
            raise CheckpointError(f"of the {count} experts of {path} some parts are missing; fetch them again", missing)
        gate_up_formats, down_formats = (
            {formats.get(f"{path}.{i}.{matrix}_proj") for i in range(count) for matrix in stacked}
            for stacked in (("gate", "up"), ("down",))
        )
        both = gate_up_formats | down_formats
        if len(gate_up_formats) > 1 or len(down_formats) > 1 or len({format and format.kind for format in both}) > 1:
            raise CheckpointError(
                f"the experts of {path} are in several formats, {both}; those of a layer must share one"
            )
        (gate_up_format,), (down_format,) = gate_up_formats, down_formats
        in_out = gate_up_format is None
        for part in parts:
            suffix = "" if in_out else f".{part}"
            gate, up, down = (matrices[matrix, part] for matrix in ("gate", "up", "down"))
            gate_up = tuple((gate[i], up[i]) for i in range(count))
            self._stacks[f"{path}.gate_up_proj{suffix}"] = _Stack(gate_up, in_out)
            self._stacks[f"{path}.down_proj{suffix}"] = _Stack(tuple((down[i],) for i in range(count)), in_out)
        if gate_up_format is not None and down_format is not None:
            self.plan |= {f"{path}.gate_up_proj": gate_up_format, f"{path}.down_proj": down_format}

    def names(self) -> Collection[str]:
        return [*self._single, *self._stacks]

    def spec(self, name: str) -> TensorSpec:
        if name in self._single:
            return self._spec(self._single[name])
        stack = self._stacks[name]
        specs = [self._spec(matrix) for matrix in stack.names[0]]
        rows, columns = sum(spec.shape[0] for spec in specs), specs[0].shape[1]
        shape = (len(stack.names), columns, rows) if stack.in_out else (len(stack.names), rows, columns)
        return TensorSpec(shape, specs[0].dtype)

    def read(self, name: str) -> Tensor:
        if name in self._single:
            return self._read(self._single[name])
        stack = self._stacks[name]
        whole = memory.empty(*self.spec(name))
        for expert, names in zip(whole, stack.names, strict=True):
            matrix = torch.cat([self._read(one) for one in names])
            expert.copy_(matrix.mT if stack.in_out else matrix)
        return whole

    def is_mapped(self, name: str) -> bool:
        file_name = self._single.get(name)
        return file_name is not None and file_name not in self._bytes_in_int32 and self._source.is_mapped(file_name)

    def origin(self, name: str) -> Origin:
        file_name = self._stacks[name].names[0][0] if name in self._stacks else self._single.get(name, name)
        return self._source.origin(file_name)

    def _spec(self, name: str) -> TensorSpec:
        spec = self._source.spec(name)
        if name not in self._bytes_in_int32:
            return spec
        *rows, columns = spec.shape
        return TensorSpec((*rows, columns * 4), torch.int8)

    def _read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        if name not in self._bytes_in_int32:
            return tensor
        return (tensor.contiguous().view(torch.uint8) ^ 128).view(torch.int8)  # each is stored 128 larger


# -- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slice:
    """Part of a stacked tensor: of one expert, some of the rows."""

    name: str
    expert: int
    index: int
    count: int
    """The rows are number `index` of `count` equal runs."""
    in_out: bool

    def shape(self, stacked: Shape) -> Shape:
        rows, columns = (stacked[2], stacked[1]) if self.in_out else stacked[1:]
        return rows // self.count, columns

    def of(self, stacked: Tensor) -> Tensor:
        matrix = stacked[self.expert].mT if self.in_out else stacked[self.expert]
        return matrix.chunk(self.count)[self.index]


class ExpandedSource:
    """What `CompressedSource` stacks, taken apart: each expert's matrices, and the shapes of those that are packed.

    Args:
        source: tensors of the model, with the parts of packed weights.

    Attributes:
        formats: quantized module -> its format.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.plan = source.plan
        self.formats: dict[str, WeightFormat] = {}
        self._single: dict[str, None] = {}
        self._slices: dict[str, _Slice] = {}
        self._shapes: dict[str, Tensor] = {}
        self._last: tuple[str, Tensor | None] = ("", None)
        for name in source.names():
            match = _STACK.fullmatch(name)
            if match is None:
                self._single[name] = None
                module = name.rpartition(".")[0]
                self._note(name, source.spec(name), self.plan.get(f"{module}.weight"))
                continue
            path, part, in_out = match["path"], match["part"] or "weight", match["part"] is None
            halves = ("gate", "up") if match["matrix"] == "gate_up" else ("down",)
            spec, format = source.spec(name), self.plan.get(f"{path}.{match['matrix']}_proj")
            for i in range(spec.shape[0]):
                for k, half in enumerate(halves):
                    new, piece = f"{path}.{i}.{half}_proj.{part}", _Slice(name, i, k, len(halves), in_out)
                    self._slices[new] = piece
                    self._note(new, spec._replace(shape=piece.shape(spec.shape)), format)

    def _note(self, name: str, spec: TensorSpec, format: WeightFormat | None) -> None:
        """The format of a quantized module, and the shape that its packed values stand for."""
        module, _, part = name.rpartition(".")
        if format is None or part not in format.parts:
            return
        self.formats[module] = format
        if part == "weight_packed":
            values_in_one = spec.dtype.itemsize * 8 // format.bits
            self._shapes[f"{module}.weight_shape"] = torch.tensor([spec.shape[0], spec.shape[1] * values_in_one])

    def names(self) -> Collection[str]:
        return [*self._single, *self._slices, *self._shapes]

    def spec(self, name: str) -> TensorSpec:
        if name in self._single:
            return self._source.spec(name)
        if name in self._shapes:
            return TensorSpec((2,), torch.int64)
        piece = self._slices[name]
        spec = self._source.spec(piece.name)
        return spec._replace(shape=piece.shape(spec.shape))

    def read(self, name: str) -> Tensor:
        if name in self._single:
            return self._source.read(name)
        if name in self._shapes:
            return self._shapes[name]
        piece = self._slices[name]
        if self._last[0] != piece.name:
            self._last = ("", None)
            self._last = (piece.name, self._source.read(piece.name))
        assert self._last[1] is not None
        return piece.of(self._last[1])

    def is_mapped(self, name: str) -> bool:
        return name in self._single and self._source.is_mapped(name)

    def origin(self, name: str) -> Origin:
        return self._source.origin(self._slices[name].name if name in self._slices else name)
