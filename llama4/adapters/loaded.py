"""The adapters that are loaded beside a model, by name, of which it computes with one or none."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from llama4.adapters.files import load_adapter
from llama4.adapters.lora import Adapter
from llama4.adapters.merge import check_can_merge, merge_adapter
from llama4.errors import ArgumentError, ConfigError, Llama4Error
from llama4.files import user_path
from llama4.model.multimodal import Llama4Model
from llama4.weights.side_files import NO_SIDE_FILES, SideFiles

logger = logging.getLogger(__name__)

T = TypeVar("T")
_changing = threading.Lock()
"""Hooks are taken off and put on by one thread at a time."""


class Adapters(Mapping[str, Adapter]):
    """Adapters of a model, by name.

    Args:
        side_files: of the model, whose chat template counts.

    Attributes:
        active: the name of the one that the model computes with; None for none.
        changes: how often that has changed.
        are_merged: whether one of them is being added to the weights, or was: they are then ones of another model.
        is_broken: whether that broke off: to some matrices it was added, and what they were is lost.
    """

    def __init__(self, model: Llama4Model, side_files: SideFiles = NO_SIDE_FILES) -> None:
        self._model, self._side_files = model, side_files
        self._adapters: dict[str, Adapter] = {}
        self._versions: Counter[str] = Counter()
        self.changes = 0
        self.are_merged = self.is_broken = False
        self.active: str | None = None

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def state(self) -> object:
        """What the model computes with beside its weights: the active adapter; without one this object, which is
        another after an adapter was merged.

        Raises:
            Llama4Error: see `check_whole`.
        """
        self.check_whole()
        active = self.active
        return self if active is None else self._adapters[active]

    def add(self, name: str, adapter: Adapter | str | Path) -> None:
        """One more, or another one of a name, which is taken off: an adapter, or a directory as PEFT writes it.

        Raises:
            Llama4Error: the directory holds no adapter that fits the model.
        """
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, self._model)
        loaded.check(self._model)
        if not isinstance(adapter, Adapter):
            self._note_template(user_path(adapter))
        if name == self.active:
            self.activate(None)
        self._adapters[name] = loaded
        self._versions[name] += 1

    def version(self, name: str) -> int:
        """Differs for those that have had this name: how many there were."""
        return self._versions[name]

    def check(self, name: str) -> None:
        """Raises:
        ArgumentError: there is none of that name.
        """
        if name not in self._adapters:
            there = ", ".join(self._adapters) or "none is loaded"
            raise ArgumentError(f"there is no adapter {name!r:.80}; those loaded: {there}")

    def check_whole(self) -> None:
        """Raises:
        Llama4Error: a merge broke off, so the model is neither with nor without the adapter.
        """
        if self.is_broken:
            raise Llama4Error("merging an adapter broke off, and part of the weights has it: load the model again")

    def _note_template(self, directory: Path) -> None:
        """PEFT's trainers leave the tokenizer's files beside an adapter. They are not read; where a chat template among
        them is not the model's, prompts may not be what the adapter was trained on."""
        with suppress(ConfigError):  # of a file that has no effect
            own = SideFiles.read(directory).chat_templates
            if own and own != self._side_files.chat_templates:
                logger.warning(
                    "%s holds another chat template than the model's; it has no effect: prompts are written as beside "
                    "the model's weights. If the adapter was trained with it, put it there",
                    directory,
                )

    def activate(self, name: str | None) -> None:
        """Compute with one, or with none.

        Raises:
            ArgumentError: there is none of that name.
        """
        self.check_whole()
        if name is not None:
            self.check(name)
        with _changing:
            if name == self.active:
                return
            self.changes += 1  # first: a forward that meets what comes now ends later
            if self.active is not None:
                self._adapters[self.active].detach()
                self.active = None  # also if the next fails
            if name is not None:
                self._adapters[name].attach(self._model)
            self.active = name

    def merge(self, name: str, *, progress: bool = False) -> Adapters:
        """Add one to the weights, see `merge_adapter`; these are then ones of another model.

        Returns:
            The adapters of that model, none so far.

        Raises:
            Llama4Error: see `check_can_merge`; nothing is changed then. What else ends it, such as Ctrl-C, leaves a
                model that must be loaded again: see `check_whole`.
        """
        self.check_whole()
        adapter = self[name]
        check_can_merge(adapter, self._model)
        try:
            self.are_merged = True
            self.activate(None)
            merge_adapter(adapter, self._model, progress=progress)
        except BaseException:
            self.is_broken = True
            raise
        return Adapters(self._model, self._side_files)

    def unchanged(self, reply: Iterator[T], changes: int) -> Iterator[T]:
        """A reply's events, as long as `changes` is what it was when the reply began.

        Raises:
            Llama4Error: another thread, or who reads the reply, chose another adapter in between, or merged one.
        """
        for event in reply:
            if self.changes != changes or self.are_merged:
                raise Llama4Error(
                    "another adapter was chosen, or one was merged, while this reply was being written; ask again, and "
                    "change adapters between replies"
                )
            yield event
