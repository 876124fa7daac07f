"""A model that is larger than memory: what every token needs is copied when a layer first computes, not while loading.

Until then such weights stay in the files' memory map, in a checkpoint's order, which computes the same and takes
longer. So loading reads next to nothing. A layer's are copied by a thread, while the layer before computes and waits
for its experts: a first prompt reads nearly all of the files anyhow.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama4.ops.memory import read_ahead
from llama4.quantization.weight import QuantizedWeight
from llama4.weights import memory

_IN_LAYER = re.compile(r"(?P<layer>.*\.layers\.\d+)\..*")


def copy_at_first_use(model: nn.Module, names: Sequence[str]) -> None:
    """Let parameters that are in a file's memory map be copied into memory of their own, in large pages and in the
    kernels' order, before their decoder layer first computes; those outside of the layers, before their module does.

    Args:
        names: of parameters of Linears, and of parts of quantized weights.
    """
    needed: dict[str, dict[nn.Module, dict[str, int]]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        match = _IN_LAYER.fullmatch(path)
        user, module = match["layer"] if match else path, model.get_submodule(path)
        needed.setdefault(user, {}).setdefault(module, {})[leaf] = module.get_parameter(leaf).data_ptr()
    hooks: list[FirstUse] = []
    for path, module in model.named_modules():
        if path in needed:
            hooks.append(FirstUse(needed[path], hooks))
            hooks[-1].handle = module.register_forward_pre_hook(hooks[-1])


@dataclass(frozen=True)
class _Copied:
    """A module's parameters by name, where they were, and copies of them."""

    module: nn.Module
    addresses: Mapping[str, int]
    copies: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, in_file: Mapping[str, int]) -> _Copied:
        """
        Args:
            in_file: where the parameters are that are in a file's memory map, if they were not replaced. Of a quantized
                weight others are copied, too: all are in one order.
        """
        names: Iterable[str] = module.specs if isinstance(module, QuantizedWeight) else in_file
        parts = {name: module.get_parameter(name).detach() for name in names}
        addresses = {name: part.data_ptr() for name, part in parts.items()}
        copies = {}
        for name, part in parts.items():
            ordered, is_in_file = part, addresses[name] == in_file.get(name)
            if isinstance(module, QuantizedWeight):
                ordered = module.format.to_kernel_layout(name, part)
                is_in_file &= module.checkpoint_dtype(name) == part.dtype
            copies[name] = _copy(part, ordered, is_in_file=is_in_file)
        return cls(module, addresses, copies)

    def put(self) -> None:
        """Into the places of the module's own, unless these have moved."""
        parameters = {name: self.module._parameters.get(name) for name in self.copies}
        if any(p is None or p.data_ptr() != self.addresses[name] for name, p in parameters.items()):
            return
        for name, parameter in parameters.items():
            assert parameter is not None
            parameter.data = self.copies[name]
        if isinstance(self.module, QuantizedWeight):
            self.module.keeps_checkpoint_layout, self.module.in_kernel_layout = False, True


def _copy(part: Tensor, ordered: Tensor, *, is_in_file: bool) -> Tensor:
    """In large pages. What was copied makes room in the system's memory."""
    if is_in_file:
        return memory.copied_from_file(part, ordered, from_cache=True)
    return memory.in_large_pages(ordered).view(part.shape)


class FirstUse:
    """A hook before the first forward of a module: copies of weights that it needs take their places.

    Args:
        weights: modules, and where their parameters are in memory, by name.
        hooks: of all modules, in the order in which they compute, to be filled by the caller: when these copies are
            there, those of the next are begun.
    """

    handle: RemovableHandle

    def __init__(self, weights: Mapping[nn.Module, Mapping[str, int]], hooks: Sequence[FirstUse]) -> None:
        self._weights, self._hooks = weights, hooks
        self._copied: list[_Copied] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model: what is under way is not theirs."""
        return self.__dict__ | {"_copied": None, "_thread": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        with self._lock:
            if not self._weights:  # another thread was first
                return
            if self._thread is not None:
                self._thread.join()
            if self._copied is None:
                self._copy()
            following = self._hooks.index(self) + 1
            if following < len(self._hooks):
                self._hooks[following].begin()
            assert self._copied is not None
            with torch.inference_mode(False):
                for copied in self._copied:
                    copied.put()
            self._weights, self._copied, self._thread = {}, None, None
            self.handle.remove()

    def begin(self) -> None:
        """Copy, in a thread."""
        thread = threading.Thread(target=self._copy, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: copies are made when they are needed
            return
        self._thread = thread

    def _copy(self) -> None:
        with torch.inference_mode(False):
            read_ahead(module.get_parameter(name) for module, names in self._weights.items() for name in names)
            self._copied = [_Copied.of(*weight) for weight in self._weights.items()]
