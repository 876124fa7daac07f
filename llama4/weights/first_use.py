"""A model that is larger than memory: what every token needs is copied when a layer first computes, not while loading.

Until then such weights stay in the files' memory map, in a checkpoint's order, which computes the same and takes
longer. So loading reads next to nothing. A layer's are copied by a thread, while the layer before computes and waits
for its experts: a first prompt reads nearly all of the files anyhow.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama4.ops.memory import read_ahead
from llama4.quantization.weight import QuantizedWeight
from llama4.weights import memory

_State = tuple[int, int]
"""A parameter's address, and how often it was written to: others once it was replaced or changed."""
_IN_LAYER = re.compile(r"(?P<layer>.*\.layers\.\d+)\..*")


def copy_at_first_use(model: nn.Module, names: Sequence[str]) -> None:
    """Let parameters that are in a file's memory map be copied into memory of their own, in large pages and in the
    kernels' order, before their decoder layer first computes; those outside of the layers, before their module does.

    Args:
        names: of parameters of Linears, and of parts of quantized weights.
    """
    needed: dict[str, dict[nn.Module, dict[str, _State]]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        match = _IN_LAYER.fullmatch(path)
        user, module = match["layer"] if match else path, model.get_submodule(path)
        needed.setdefault(user, {}).setdefault(module, {})[leaf] = _state(module.get_parameter(leaf))
    hooks: list[FirstUse] = []
    for path, module in model.named_modules():
        if path in needed:
            hooks.append(FirstUse(needed[path], hooks))
            hooks[-1].handle = module.register_forward_pre_hook(hooks[-1])


def _state(parameter: Tensor) -> _State:
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


@dataclass(frozen=True)
class _Copied:
    """Copies of a module's parameters by name, and what these were when they were copied.

    Attributes:
        in_file: what those were that are in a file's memory map, when they were loaded.
    """

    module: nn.Module
    in_file: Mapping[str, _State]
    states: Mapping[str, _State]
    copies: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, in_file: Mapping[str, _State]) -> _Copied:
        """Of a quantized weight all parts, also those that are not in a file: they are in one order."""
        names: Iterable[str] = module.specs if isinstance(module, QuantizedWeight) else in_file
        parameters = {name: module.get_parameter(name) for name in names}
        states = {name: _state(parameter) for name, parameter in parameters.items()}
        copies = {}
        for name, parameter in parameters.items():
            part = ordered = parameter.detach()
            if isinstance(module, QuantizedWeight):
                ordered = module.format.to_kernel_layout(name, part)
            copies[name] = memory.in_large_pages(ordered).view(part.shape)
        return cls(module, in_file, states, copies)

    def put(self) -> None:
        """Into the places of the module's own, unless one of these has been replaced or written to. Interrupted, it may
        be called again."""
        parameters = {name: self.module._parameters.get(name) for name in self.copies}
        waiting: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if parameter is not None and parameter.data_ptr() == self.copies[name].data_ptr():
                continue
            if parameter is None or _state(parameter) != self.states[name]:
                return
            waiting[name] = parameter
        left = []
        for name, parameter in waiting.items():
            if self.states[name] == self.in_file.get(name) and self._is_as_in_file(name, parameter):
                left.append(parameter.detach())
            parameter.data = self.copies[name]
        if isinstance(self.module, QuantizedWeight):
            self.module.keeps_checkpoint_layout, self.module.in_kernel_layout = False, True
        for part in left:  # what was copied makes room in the system's memory
            memory.drop(part, from_cache=True)

    def _is_as_in_file(self, name: str, parameter: Tensor) -> bool:
        return not isinstance(self.module, QuantizedWeight) or self.module.checkpoint_dtype(name) == parameter.dtype


class FirstUse:
    """A hook before the first forward of a module: copies of weights that it needs take their places.

    Args:
        weights: modules, and the state of their parameters by name.
        hooks: of all modules, in the order in which they compute, to be filled by the caller: when these copies are
            there, those of the next are begun.
    """

    handle: RemovableHandle

    def __init__(self, weights: Mapping[nn.Module, Mapping[str, _State]], hooks: Sequence[FirstUse]) -> None:
        self._weights, self._hooks = weights, hooks
        self._copied: list[_Copied] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model: what is under way is not theirs."""
        return self.__dict__ | {"_copied": None, "_thread": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        _all.add(self)

    def after_fork(self) -> None:
        """In a child, which has none of the threads: of them, and of what holds the lock."""
        self._lock, self._thread = threading.Lock(), None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():  # weights compute where they are
            return
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
        """Copy, in a thread, unless that was begun by a call that was interrupted."""
        if self._thread is not None or self._copied is not None:
            return
        thread = threading.Thread(target=self._try_to_copy, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: copies are made when they are needed
            return
        self._thread = thread

    def _copy(self) -> None:
        with torch.inference_mode(False):
            read_ahead(module.get_parameter(name) for module, names in self._weights.items() for name in names)
            self._copied = [_Copied.of(*weight) for weight in self._weights.items()]

    def _try_to_copy(self) -> None:
        with suppress(Exception):  # it is tried again by whoever needs the copies
            self._copy()


_all: weakref.WeakSet[FirstUse] = weakref.WeakSet()


def _after_fork() -> None:
    for hook in list(_all):
        hook.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
