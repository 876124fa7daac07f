"""The adapters that are loaded beside a model, by name, of which it computes with one or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from llama4.adapters.files import load_adapter
from llama4.adapters.lora import Adapter
from llama4.errors import ArgumentError
from llama4.model.multimodal import Llama4Model


class Adapters(Mapping[str, Adapter]):
    """Adapters of a model, by name.

    Attributes:
        active: the name of the one that the model computes with; None for none.
    """

    def __init__(self, model: Llama4Model) -> None:
        self._model = model
        self._adapters: dict[str, Adapter] = {}
        self.active: str | None = None

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def add(self, name: str, adapter: Adapter | str | Path) -> None:
        """One more, or another one of a name, which is taken off: an adapter, or a directory as PEFT writes it.

        Raises:
            Llama4Error: the directory holds no adapter that fits the model.
        """
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, self._model)
        loaded.check(self._model)
        if name == self.active:
            self.activate(None)
        self._adapters[name] = loaded

    def check(self, name: str) -> None:
        """Raises:
        ArgumentError: there is none of that name.
        """
        if name not in self._adapters:
            there = ", ".join(self._adapters) or "none is loaded"
            raise ArgumentError(f"there is no adapter {name!r:.80}; those loaded: {there}")

    def activate(self, name: str | None) -> None:
        """Compute with one, or with none.

        Raises:
            ArgumentError: there is none of that name.
        """
        if name is not None:
            self.check(name)
        if self.active is not None:
            self._adapters[self.active].detach()
        if name is not None:
            self._adapters[name].attach(self._model)
        self.active = name
