"""Rows of one forward that compute with an adapter each.

The product with the base's matrix is one for all rows, as in Punica and S-LoRA (Chen et al. 2023, Sheng et al. 2023);
what an adapter adds is computed for its own rows, which stand together. A row gets what it gets alone: only adapters
that change the same modules share a forward, so that nothing is replaced for a row that its own adapter leaves alone.

Forwards of modules are replaced for the time of a forward of the model, and no hooks are set: what was prepared for
steps without an adapter stays.

Shapes: N packed tokens, R routed rows sorted by expert, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn

from llama4.adapters.loaded import Adapters
from llama4.adapters.lora import STACKS, Adapter, Lora, experts_forward, router_methods
from llama4.model.dispatch import LocalDispatcher
from llama4.model.experts import Experts
from llama4.model.moe import MixtureOfExperts, Router
from llama4.model.multimodal import Llama4Model
from llama4.ops.routing import Dispatched
from llama4.quantization.modules import QuantizedExperts

LANGUAGE = "language_model."


@dataclass(frozen=True, order=True)
class RowAdapter:
    """What a row computes with beside the model, from its first token to its last, whatever the name stands for later:
    an adapter, or none.

    Attributes:
        name, version: differ for those that have been loaded.
        modules: equal for rows that may share a forward: the modules of the language model that it changes; with layers
            of cross-attention, the adapter, too.
    """

    name: str = ""
    version: int = 0
    adapter: Adapter | None = field(default=None, compare=False)
    modules: tuple[str, ...] = field(default=(), compare=False)


NO_ADAPTER = RowAdapter()
Part = tuple[RowAdapter, int]
"""An adapter, and how many rows or tokens in succession compute with it."""


class RowAdapters:
    """The adapters that are loaded beside a model, for rows that choose among them.

    Args:
        adapters: those of the model; what they are and which is active may change between two forwards.
    """

    def __init__(self, model: Llama4Model, adapters: Adapters) -> None:
        self._model, self._adapters = model, adapters
        self._replacements: dict[tuple[str, ...], _Replacement] = {}

    def of(self, name: str | None) -> RowAdapter:
        """The adapter that has a name now; None for none.

        Raises:
            ArgumentError: there is none of that name.
            Llama4Error: see `Adapters.check_whole`.
        """
        self._adapters.check_whole()
        if name is None:
            return NO_ADAPTER
        self._adapters.check(name)
        adapter = self._adapters[name]
        version = self._adapters.version(name)
        modules = sorted(module for module in adapter.names if module.startswith(LANGUAGE))
        if self._model.config.text.cross_layers:  # which get tokens that see a picture alone, and pictures
            modules.append(f"{name}/{version}")
        return RowAdapter(name, version, adapter, tuple(modules))

    @contextmanager
    def computing(self, parts: Sequence[Part]) -> Iterator[Callable[[Sequence[Part]], None]]:
        """Inside, each part of the rows computes with its own adapter. Parts of several adapters are tokens of the
        language model, and `modules` are equal for them. It gives a function that says which parts, of these adapters,
        the next rows are."""
        active = self._adapters.active
        attached = self._adapters[active] if active is not None else None
        if all(own.adapter is attached for own, _ in parts):
            yield lambda parts: None
            return
        self._adapters.activate(None)
        try:
            replacement = self._replacement(parts)
            with replacement.installed():
                replacement.go_on_with(parts)
                yield replacement.go_on_with
        finally:
            self._adapters.activate(active)

    def _replacement(self, parts: Sequence[Part]) -> _Replacement:
        first = parts[0][0]
        is_one = all(own == first for own, _ in parts)
        names = tuple(first.adapter.names) if is_one and first.adapter is not None else first.modules
        assert is_one or all(own.modules == names for own, _ in parts)
        if names not in self._replacements:
            self._replacements[names] = _Replacement(self._model, names)
        return self._replacements[names]


class _Replacement:
    """The forwards of some modules with what adapters add; prepared once."""

    def __init__(self, model: Llama4Model, names: Sequence[str]) -> None:
        self._sums = {name: _Sum() for name in names}
        self._methods: list[tuple[nn.Module, str, Callable[..., object]]] = []
        self._dispatches: list[_Dispatch] = []
        stacks: dict[str, dict[str, _Sum]] = {}
        for name, added in self._sums.items():
            path, _, leaf = name.rpartition(".")
            if leaf in STACKS and path.endswith(".experts"):
                stacks.setdefault(path, {})[leaf] = added
            elif isinstance(module := model.get_submodule(name), Router):
                self._methods += [(module, *method) for method in router_methods(module, added).items()]
            else:
                self._methods.append((module, "forward", _forward_with(module, added)))
        for path, sums in stacks.items():
            experts, layer = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
            assert isinstance(experts, (Experts, QuantizedExperts)) and isinstance(layer, MixtureOfExperts)
            self._methods.append((experts, "forward", experts_forward(experts, sums)))
            self._dispatches.append(dispatch := _Dispatch(layer.dispatcher))
            for added in sums.values():
                added.dispatch = dispatch

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the modules compute with these."""
        replaced: list[tuple[object, str, object]] = [*self._methods]
        replaced += [(dispatch.dispatcher, "dispatch", dispatch) for dispatch in self._dispatches]
        assert not any(name in vars(owner) for owner, name, _ in replaced)
        for owner, name, function in replaced:
            vars(owner)[name] = function
        try:
            yield
        finally:
            for owner, name, _ in replaced:
                del vars(owner)[name]

    def go_on_with(self, parts: Sequence[Part]) -> None:
        """Say of what parts the next rows are; those of an adapter in succession are one."""
        rows = [own for own, _ in groupby(own for own, _ in parts)]
        sizes = [sum(size for _, size in some) for _, some in groupby(parts, key=itemgetter(0))]
        loras = [dict(own.adapter.items()) if own.adapter is not None else {} for own in rows]
        for name, added in self._sums.items():
            added.loras, added.sizes = [own[name] for own in loras], sizes
        for dispatch in self._dispatches:
            dispatch.sizes = sizes


def _forward_with(module: nn.Module, added: _Sum) -> Callable[..., Tensor]:
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        return added.to_output(x, inner(x))

    return forward


class _Dispatch:
    """Dispatches tokens to experts, and says which rows are of which part.

    Attributes:
        sizes: tokens of each part.
        rows: of each part the places of its rows, and how many of these each expert has.
    """

    sizes: Sequence[int]
    rows: list[tuple[Tensor, Tensor]]

    def __init__(self, dispatcher: LocalDispatcher) -> None:
        self.dispatcher = dispatcher

    def __call__(self, x_ND: Tensor, scores_Nk: Tensor, experts_Nk: Tensor) -> Dispatched:
        routed = type(self.dispatcher).dispatch(self.dispatcher, x_ND, scores_Nk, experts_Nk)
        if len(self.sizes) == 1:
            return routed
        counts_E, device = routed.num_tokens_per_expert_E, x_ND.device
        part_N = torch.arange(len(self.sizes), device=device).repeat_interleave(torch.tensor(self.sizes, device=device))
        part_R = part_N[routed.tokens_R]
        expert_R = torch.arange(len(counts_E), device=device).repeat_interleave(counts_E)
        places = [(part_R == part).nonzero()[:, 0] for part in range(len(self.sizes))]
        self.rows = [(own, expert_R[own].bincount(minlength=len(counts_E))) for own in places]
        return routed


class _Sum:
    """What adapters add to one matrix, or to that of each expert, each to its own rows; see `Lora`.

    Attributes:
        loras, sizes: of each part, and how many tokens it has.
        dispatch: of stacked experts, what says which rows are of which part.
    """

    loras: Sequence[Lora]
    sizes: Sequence[int]
    dispatch: _Dispatch

    def added(self, x: Tensor) -> Tensor:
        if len(self.loras) == 1:
            return self.loras[0].added(x)
        return torch.cat([lora.added(own) for lora, own in zip(self.loras, x.split(list(self.sizes)), strict=True)])

    def added_by_expert(self, x_RI: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        if len(self.loras) == 1:
            return self.loras[0].added_by_expert(x_RI, num_tokens_per_expert_E)
        sums = [
            lora.added_by_expert(x_RI[places], counts_E)
            for lora, (places, counts_E) in zip(self.loras, self.dispatch.rows, strict=True)
        ]
        order_R = torch.cat([places for places, _ in self.dispatch.rows]).argsort()
        return torch.cat(sums)[order_R]

    def to_output(self, x: Tensor, output: Tensor) -> Tensor:
        return (output + self.added(x)).to(output.dtype)
