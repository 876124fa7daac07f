"""Checkpoint -> model: strict, one tensor at a time, each read once.

What is decided for every tensor, each in a function of its own: which parameter it is (`match_names`), on which device
the parameter goes, its dtype, whether it stays in the file's memory map or is copied, and in which order a quantized
one is laid out (`QuantizedWeight`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from llama4.errors import CheckpointError
from llama4.families.names import HEAD, VISION
from llama4.ops.linear import Linear
from llama4.ops.memory import read_ahead
from llama4.ops.openmp import passive_waiting
from llama4.progress import Bar
from llama4.quantization.modules import MappedEmbedding, MappedExperts, SeparateExperts
from llama4.quantization.weight import QuantizedWeight
from llama4.units import bytes_text
from llama4.weights import memory
from llama4.weights.first_use import copy_at_first_use
from llama4.weights.source import Source


@passive_waiting()
def load(
    model: nn.Module,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    experts_device: torch.device | str | None = None,
    memory_map: bool = True,
    progress: bool = False,
) -> None:
    """Fill a model that was built on the meta device.

    On a CPU, a parameter whose dtype and order are the checkpoint's IS the file's memory map (private: changing it
    never touches the file), so that loading is nearly free and bytes are read when they are first used. All others are
    copied one by one, in large pages, and there are never two copies of the model in memory. So are some that could be
    mapped but that every token reads whole, as a file's pages are small: the head, and the Linears of a quantized model
    that are not quantized. Where routed experts stay in files since not all of them fit, this is done when a layer
    first computes, and until then all that can stays in the map.

    Args:
        model: its `named_parameters()` say what is wanted.
        source: the checkpoint.
        dtype: of the parameters; None keeps the checkpoint's.
        device: where they go, and where the model computes.
        experts_device: where routed experts go, if elsewhere.
        memory_map: false copies even what could be mapped, which takes time now and may save some with every token.
        progress: show a bar, where somebody sees it.

    Raises:
        CheckpointError: keys that are missing, unexpected or of another shape, all of them listed; or more weights than
            memory. Nothing is loaded then.
    """
    names, aliases = match_names(model, source), _aliases(model)
    device = torch.device(device)
    placement = _Placement(
        source,
        dtype=dtype,
        device=device,
        experts_device=torch.device(experts_device) if experts_device is not None else device,
        memory_map=memory_map,
        is_quantized=any(isinstance(module, QuantizedWeight) for module in model.modules()),
    )
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.choose_layout(device)
    placement.check_room(model, names)
    mapped = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, SeparateExperts) and placement.stay_mapped(path, module)
    }
    first_use: Sequence[str] = ()
    if mapped:
        first_use = placement.copied_from_map(model, names)
        placement = replace(placement, first_use=frozenset(first_use))
        placement.keep_checkpoint_layout(model)
    names.sort(key=lambda name: source.origin(name).file or "")  # each file is mapped once
    sizes = {name: source.spec(name).nbytes for name in names}
    with Bar("loading", sum(sizes.values()), "bytes", shown=progress) as bar:
        for name, following in zip(names, [*names[1:], None], strict=True):
            with bar.step(sizes[name]):
                if following is not None and source.origin(following).file == source.origin(name).file:
                    placement.read_ahead(model, following)
                _load_one(model, name, aliases, placement)
    of_layers: list[MappedExperts] = []
    for path, experts in mapped.items():
        of_layers.append(MappedExperts(experts, of_layers))
        model.set_submodule(path, of_layers[-1])
    for path, module in list(model.named_modules()) if mapped else ():
        if type(module) is nn.Embedding and placement.stays_mapped(f"{path}.weight", module):
            model.set_submodule(path, MappedEmbedding(module))
    copy_at_first_use(model, first_use)
    for path, module in model.named_children() if mapped else ():
        if f"{path}.".startswith(VISION):
            module.register_forward_pre_hook(_read_ahead)
    assert not any(p.is_meta for p in model.parameters()), "a parameter was left without values"


def _read_ahead(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook before a part computes that is mostly in files, and seldom in use."""
    read_ahead(module.parameters())


def _load_one(model: nn.Module, name: str, aliases: Mapping[str, Sequence[str]], placement: _Placement) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if _is_part(module, leaf):
        module.set_part(leaf, placement.part(name, module, leaf))
        for alias in aliases[name][1:]:
            model.get_submodule(alias.rpartition(".")[0]).register_parameter(leaf, module.get_parameter(leaf))
        return
    values = placement.parameter(name, module)
    parameter = nn.Parameter(values, requires_grad=values.is_floating_point())
    for alias in aliases[name]:
        path, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(path), leaf, parameter)


@dataclass(frozen=True)
class _Placement:
    """Where the parameters of a model go, and in which dtype and order; see `load`."""

    source: Source
    dtype: torch.dtype | None
    device: torch.device
    experts_device: torch.device
    memory_map: bool
    is_quantized: bool
    first_use: Collection[str] = ()
    """Parameters that stay in the file's memory map until they are first used: not all experts fit into memory."""

    def check_room(self, model: nn.Module, names: Sequence[str]) -> None:
        """See, before anything is read, that what does not stay in the files fits into memory.

        Raises:
            CheckpointError: it does not.
        """
        sizes: dict[torch.device, int] = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            module, spec = model.get_submodule(path), self.source.spec(name)
            dtype = self.dtype if self.dtype is not None and not _is_part(module, leaf) else spec.dtype
            if not self.stays_mapped(name, module):
                device = self._device(name)
                sizes[device] = sizes.get(device, 0) + spec._replace(dtype=dtype).nbytes
        for device, size in sizes.items():
            if size > (room := memory.total(device)):
                quantize = "" if self.source.plan else "quantize them while they are loaded (quantization='int4'), or "
                raise CheckpointError(
                    f"{bytes_text(size)} of weights do not fit into the {bytes_text(room)} of memory of {device}; "
                    f"{quantize}take a checkpoint that is smaller"
                )

    def read_ahead(self, model: nn.Module, name: str) -> None:
        """While a tensor is copied, the system reads the next one that will be."""
        if self.source.is_mapped(name) and not self.stays_mapped(name, model.get_submodule(name.rpartition(".")[0])):
            read_ahead([self.source.read(name)])

    def parameter(self, name: str, module: nn.Module) -> Tensor:
        """The values of a parameter that is not quantized."""
        raw = self.source.read(name)
        return self._place(name, raw, raw, self.dtype or raw.dtype, stays=self.stays_mapped(name, module))

    def part(self, name: str, weight: QuantizedWeight, part: str) -> Tensor:
        """The values of a part of a quantized one."""
        raw = self.source.read(name)
        ordered = weight.from_checkpoint_layout(part, raw)
        return self._place(name, raw, ordered, raw.dtype, stays=self.stays_mapped(name, weight))

    def copied_from_map(self, model: nn.Module, names: Sequence[str]) -> list[str]:
        """Parameters that could stay in the file's memory map, and do not."""
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
        return [
            name
            for name, module in modules.items()
            if self._can_stay_mapped(name, module) and not self.stays_mapped(name, module)
        ]

    def keep_checkpoint_layout(self, model: nn.Module) -> None:
        """Expect quantized weights that are copied at their first use in the order that the file has."""
        for name in self.first_use:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if _is_part(module, leaf):
                module.keeps_checkpoint_layout = True
                module.choose_layout(self.device)

    def stay_mapped(self, path: str, experts: SeparateExperts) -> bool:
        """Whether something of the experts of a layer stays in the file's memory map."""
        names = [name for name, _ in experts.named_parameters()]
        return any(self.stays_mapped(f"{path}.{n}", experts.get_submodule(n.rpartition(".")[0])) for n in names)

    def stays_mapped(self, name: str, module: nn.Module) -> bool:
        """Whether a tensor of a module stays in the file's memory map. What every token reads whole does not, if it is
        to be in another order or in large pages."""
        if not self._can_stay_mapped(name, module):
            return False
        if name in self.first_use:
            return True
        if _is_part(module, name.rpartition(".")[2]):
            return not module.in_kernel_layout
        return name != HEAD and not (self.is_quantized and isinstance(module, Linear))

    def _can_stay_mapped(self, name: str, module: nn.Module) -> bool:
        """Whether what is in the file's memory map is what the model computes with, its order apart."""
        if self._device(name).type != "cpu" or not self.memory_map or not self.source.is_mapped(name):
            return False
        return _is_part(module, name.rpartition(".")[2]) or self.dtype in (None, self.source.spec(name).dtype)

    def _device(self, name: str) -> torch.device:
        return self.experts_device if ".experts." in name else self.device

    def _place(self, name: str, raw: Tensor, ordered: Tensor, dtype: torch.dtype, *, stays: bool) -> Tensor:
        """A tensor as the model has it.

        Args:
            raw: as it was read.
            ordered: the same, or a view of it in another order.
            stays: see `stays_mapped`.
        """
        device = self._device(name)
        if device.type != "cpu":
            return ordered.to(device, dtype)
        if stays:
            return raw
        if not self.source.is_mapped(name):
            return memory.in_large_pages(ordered, dtype).view(raw.shape)
        return memory.copied_from_file(raw, ordered, dtype, from_cache=bool(self.first_use))


def _is_part(module: nn.Module, leaf: str) -> TypeGuard[QuantizedWeight]:
    """Whether a name of a module's parameters is that of a part of packed weights, not of a bias."""
    return isinstance(module, QuantizedWeight) and leaf in module.specs


def match_names(model: nn.Module, source: Source) -> list[str]:
    """The names that a model's parameters have in a source; further names of a tied one may be there, and are not used.

    Raises:
        CheckpointError: the two sides do not correspond one to one.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = {alias for name, aliases in _aliases(model).items() for alias in aliases if alias != name}
    present = set(source.names())
    missing = [source.origin(name).key for name in shapes if name not in present]
    unexpected = [source.origin(name).key for name in sorted(present - shapes.keys() - tied)]
    mismatched = [
        (source.origin(name).key, source.spec(name).shape, shape)
        for name, shape in shapes.items()
        if name in present and source.spec(name).shape != shape
    ]
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"the checkpoint does not fit its configuration: {len(missing)} keys missing, {len(unexpected)} "
            f"unexpected, {len(mismatched)} of another shape; check that configuration and weights are of one model",
            missing,
            unexpected,
            mismatched,
        )
    return list(shapes)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter -> all its names (tied embeddings have two)."""
    names: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names
