"""The compressed-tensors format, which llm-compressor writes and vLLM and transformers read.

In its files every expert is three Linears, `experts.7.gate_proj.weight_packed` and so on, out x in; see experts.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import regex
import torch
from torch import Tensor

from llama4.config.typed import section
from llama4.errors import CheckpointError
from llama4.families.names import HEAD, NameTable
from llama4.patterns import Patience, compile_pattern
from llama4.quantization.int4_zeros import Int4Zeros
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import WeightFormat
from llama4.weights.compressed_formats import COMPRESSED_FORMATS, Scaled
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.experts import ExpandedSource
from llama4.weights.ordered import order_by_groups
from llama4.weights.quant_method import QuantMethod, without_cache_scales
from llama4.weights.source import Source
from llama4.weights.stored import DecodedSource, StoredFormat

_TOWER = re.compile(r".*(vision_model|multi_modal_projector)\..*")
_QUANTIZED = ("weight_scale", "weight_packed")
"""Parts that only quantized matrices have."""
_PATIENCE = 10.0
"""Seconds that all patterns may take, to be read and for all names: a usual one takes a microsecond or two a name."""
_LINEAR = ("Linear", "LinearBase", "Module")
"""Targets that are the class of a Linear."""

Group = tuple[list[str], StoredFormat]
"""Targets, and their format."""


class CompressedTensors(QuantMethod):
    """What the package compressed-tensors writes: integers of up to 8 bits, and fp8."""

    name = "compressed-tensors"

    def check(self, content: Mapping[str, Any]) -> None:
        read_groups(content)

    def open(self, source: Source, content: Mapping[str, Any], dtype: torch.dtype, table: NameTable) -> Source:
        groups = read_groups(content)
        if content.get("kv_cache_scheme"):
            source = without_cache_scales(source)
        names = [name.rpartition(".") for name in source.names()]
        modules = dict.fromkeys(module for module, _, part in names if part in _QUANTIZED)
        targets = _Targets(groups)
        stored = {module: _ordered(targets.format_of(module, source), module, source) for module in modules}
        return DecodedSource(source, stored, dtype)

    def writes(self, plan: QuantizationPlan) -> bool:
        return all(
            format is not None and format.compressed_name is not None and format.order is None
            for format in plan.values()
        )

    def encode(
        self, source: Source, content: Mapping[str, Any] | None, table: NameTable
    ) -> tuple[Source, Mapping[str, Any]]:
        expanded = ExpandedSource(source)
        return _apart(expanded), quantization_config(expanded, table)


# -- configuration -------------------------------------------------------------------------------------------------


def read_groups(content: Mapping[str, Any]) -> list[Group]:
    """The groups of a `quantization_config` that have quantized weights: modules, or patterns of them, in the files'
    names, and how they are stored.

    Raises:
        CheckpointError: a format that this library does not read, with the fields that say so.
    """
    groups, sparsity = content.get("config_groups"), content.get("sparsity_config") or {}
    _check_transforms(content)
    for stored in (sparsity.get("format") or "dense", content.get("format") or "dense"):
        if stored.startswith("sparse") or stored == "marlin-24":
            raise CheckpointError(
                f"the checkpoint stores its weights as {stored!r}, without their zeros, which this library does not "
                "read; take one that stores them whole (sparsity_config with format 'dense', or none)"
            )
    if (content.get("kv_cache_scheme") or sparsity) and not groups:
        return []  # the cache alone is quantized, or weights are whole, and some are zero
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups: the configuration is damaged; fetch it again")
    read = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{name} of quantization_config is {group!r}, not a group; fetch the file again")
        if group.get("weights"):
            read.append((list(group.get("targets") or ["Linear"]), _read_format(name, group)))
    return read


def _check_transforms(content: Mapping[str, Any]) -> None:
    """Raises:
    CheckpointError: rotations that are computed while the model runs, as SpinQuant and QuIP have them; those of
        weights alone are in the weights.
    """
    place = "transform_config"
    groups = section(section(content, place, "quantization_config"), "config_groups", place)
    for name in groups:
        steps = section(groups, name, place).get("apply")
        if not isinstance(steps, list | None):
            raise CheckpointError(f"{name} of {place} has apply {steps!r:.80}; it must be a list")
        places = [step.get("location") for step in steps or () if isinstance(step, Mapping)]
        if online := sorted(set(map(str, places)) - {"weight_input", "weight_output"}):
            raise CheckpointError(
                f"the checkpoint rotates {' and '.join(online)} of its modules while it runs ({name} of {place}), "
                "which this library does not compute; take one without transforms, or with those of weights alone"
            )


def _read_format(name: str, group: Mapping[str, Any]) -> StoredFormat:
    try:
        for cls in COMPRESSED_FORMATS:
            if (format := cls.from_group(group["weights"], group.get("input_activations"))) is not None:
                return format
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{name} of quantization_config has a value of the wrong kind: {error}") from error
    weights = group["weights"]
    found = {
        key: weights[key]
        for key in ("type", "num_bits", "strategy", "group_size", "scale_dtype", "dynamic")
        if key in weights
    }
    raise CheckpointError(
        f"the checkpoint is quantized in a way that this library does not read: weights of {name} are {found}. It "
        f"reads {' and '.join(cls.about for cls in COMPRESSED_FORMATS)}; take one of those, or bf16"
    )


class _Targets:
    """Which group a module is of: the one that names it exactly, else by a pattern, else by its class. Targets are
    written in the names of the files; those of older versions of this library are in the model's."""

    def __init__(self, groups: list[Group]) -> None:
        self._formats = {target: format for targets, format in groups for target in targets}
        patterns = sorted(target for target in self._formats if target.startswith("re:"))
        self._patience, self._patterns = Patience(_PATIENCE), list[tuple[regex.Pattern[str], StoredFormat]]()
        for each in patterns:
            try:
                self._patience.left()
                self._patterns.append((compile_pattern(each.removeprefix("re:")), self._formats[each]))
            except TimeoutError:
                raise self._too_slow(each) from None
            except ValueError as error:
                raise CheckpointError(f"a target in quantization_config: {error}; fetch config.json again") from None

    def format_of(self, module: str, source: Source) -> StoredFormat:
        """Raises:
        CheckpointError: no group is for it.
        """
        names = source.origin(f"{module}.weight_scale").key.removesuffix(".weight_scale"), module
        classes = ("Embedding",) if module.endswith(".embed_tokens") else _LINEAR
        exactly = (self._formats.get(name) for name in names)
        by_pattern = (format for pattern, format in self._patterns if any(self._fits(pattern, name) for name in names))
        by_class = (self._formats.get(name) for name in classes)
        for format in chain(exactly, by_pattern, by_class):
            if format is not None:
                return format
        raise CheckpointError(
            f"{names[0]} is quantized, but no group of quantization_config is for it; fetch both again"
        )

    def _fits(self, pattern: regex.Pattern[str], name: str) -> bool:
        try:
            return pattern.match(name, timeout=self._patience.left()) is not None
        except TimeoutError:
            raise self._too_slow(pattern.pattern, f", at {name!r:.80}") from None

    def _too_slow(self, pattern: str, where: str = "") -> CheckpointError:
        return CheckpointError(
            f"a target in quantization_config: {pattern!r:.80} takes more than {self._patience.seconds:g} s, which is "
            f"the limit of all targets for all names{where}; fetch config.json again"
        )


def _ordered(format: StoredFormat, module: str, source: Source) -> StoredFormat:
    """A matrix's own format, where its columns are in the order of activations."""
    name = f"{module}.weight_g_idx"
    if not isinstance(format, Scaled) or format.block[1] is None or name not in source.names():
        return format
    group_of = source.read(name)
    return replace(format, order=order_by_groups(group_of, -(-group_of.numel() // format.block[1])))


def _apart(source: ExpandedSource) -> Source:
    """Blocks of int4 with zero points as the tensors that compressed-tensors has for them."""
    tensors: dict[str, str | Computed] = {}
    for name in source.names():
        module, _, part = name.rpartition(".")
        format, spec = source.formats.get(module), source.spec(name)
        if not isinstance(format, Int4Zeros) or part not in format.parts:
            tensors[name] = name
            continue
        outputs, inputs = spec.shape[0], format.weights_in(part, spec) // spec.shape[0]
        for own, (shape, dtype) in format.compressed_specs((outputs, inputs)).items():
            compute = partial(_one_of, format, own)
            tensors[f"{module}.{own}"] = Computed({"blocks": name}, shape, dtype, compute)
    return ComputedSource(source, tensors, source.plan)


def _one_of(format: Int4Zeros, part: str, tensors: Mapping[str, Tensor]) -> Tensor:
    return format.to_compressed_parts(tensors["blocks"])[part]


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
        "ignore": sorted(
            _ignored(_in_file(ignored, table), source.formats)
            | {name for module, name in table.modules.items() if module in ignored}
        ),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _ignored(modules: Collection[str], quantized: Collection[str]) -> set[str]:
    """Names of modules, but one pattern for a part of the model in which none is quantized."""
    parts = {match[1] for module in quantized if (match := _TOWER.fullmatch(module))}
    found = {module: _TOWER.fullmatch(module) for module in modules}
    return {module if match is None or match[1] in parts else f"re:.*{match[1]}.*" for module, match in found.items()}


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
