"""How the keys of a checkpoint and the parameters of the model correspond, as tables that work both ways."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Names(Protocol):
    """What the keys of a checkpoint are called in the model, and the other way round."""

    def to_model(self, key: str) -> str | None:
        """The parameter that a key is for; None if for none."""

    def to_file(self, name: str) -> str | None:
        """What a parameter is called in the file; None if that has no name for it."""


@dataclass(frozen=True)
class NameTable:
    """Pairs (prefix in the file, prefix in the model); the first that fits renames a key."""

    prefixes: tuple[tuple[str, str], ...]

    def to_model(self, key: str) -> str | None:
        return _swap_prefix(key, self.prefixes)

    def to_file(self, name: str) -> str | None:
        return _swap_prefix(name, tuple((ours, theirs) for theirs, ours in self.prefixes))


class IdentityNames:
    """Keys that are already those of a file for the whole model."""

    def to_model(self, key: str) -> str | None:
        return key

    def to_file(self, name: str) -> str | None:
        return name


def _swap_prefix(name: str, pairs: tuple[tuple[str, str], ...]) -> str | None:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


MULTIMODAL = NameTable((("", ""),))
"""Llama4ForConditionalGeneration: the model's own names."""

TEXT_ONLY = NameTable((("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")))
"""Llama4ForCausalLM: the decoder without a prefix."""


def table_for(keys: Iterable[str]) -> NameTable:
    """The table that a checkpoint with these keys follows, also where some of them are wrong."""
    return TEXT_ONLY if any(key.startswith("model.layers.") for key in keys) else MULTIMODAL
