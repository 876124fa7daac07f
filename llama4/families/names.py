"""How the names of tensors and modules in a family's files correspond to those of the model, as tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from torch import Tensor

HEAD = "language_model.lm_head.weight"
"""The model's own name of the matrix that every token reads whole."""
EMBEDDING = "language_model.model.embed_tokens.weight"
"""And of that of which it reads a row; the same one in models whose embeddings are tied."""

VISION = ("vision_model.", "multi_modal_projector.")
"""How the model's names of what is beside the decoder begin."""


class Transform(Protocol):
    """A change of the order of a matrix's rows. What is done to a matrix [O, I] is done to all that has a row for each
    output: quantized values, scales, a bias."""

    def to_model(self, tensor: Tensor) -> Tensor: ...

    def to_file(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class HalvesToPairs:
    """Rows of q and k: the two numbers that RoPE rotates together are half a head apart in Hugging Face's files of
    Llama 1 to 3, and side by side in Meta's and in this library. Source: transformers'
    convert_llama_weights_to_hf.py."""

    head_dim: int

    def to_model(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class NameTable:
    """Names in the file and in the model, and where the two order the rows of a tensor differently.

    Args:
        paths: pairs (path in the file, path in the model), of the first components of a name; `*` stands for any one
            component. The first pair that fits renames.
        transforms: pairs (pattern of the model's modules, transform), for instance for Llama 1 to 3, whose files in
            Hugging Face's layout have the rows of q and k in halves where the model has them in pairs.
        dropped: pattern of names in the file that hold no weights, such as tables of RoPE.
        modules: modules of the model that transformers calls otherwise than the file calls their tensors.
    """

    paths: tuple[tuple[str, str], ...]
    transforms: tuple[tuple[str, Transform], ...] = field(default=())
    dropped: str = r"(?!)"
    modules: Mapping[str, str] = field(default_factory=dict)

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of the file is none of the model's."""
        return re.fullmatch(self.dropped, name) is not None

    def to_model(self, name: str) -> str | None:
        """What the model calls a tensor or module of the file; None if it has no such."""
        return next((new for rename in self._renames if (new := rename(name)) is not None), None)

    def to_file(self, name: str) -> str | None:
        """What the file calls a tensor or module of the model; None if it has no name for it."""
        return next((new for rename in self._inverse if (new := rename(name)) is not None), None)

    def transform(self, name: str) -> Transform | None:
        """How a tensor, by the model's name, changes between file and model."""
        module = name.rpartition(".")[0]
        return next((transform for pattern, transform in self.transforms if re.fullmatch(pattern, module)), None)

    @cached_property
    def _renames(self) -> list[Callable[[str], str | None]]:
        return [_renaming(old, new) for old, new in self.paths]

    @cached_property
    def _inverse(self) -> list[Callable[[str], str | None]]:
        return [_renaming(old, new) for new, old in self.paths]


def _renaming(old: str, new: str) -> Callable[[str], str | None]:
    """Names that begin with the components `old` -> the same, beginning with `new`; others -> None."""
    pattern = re.compile(re.escape(old).replace(r"\*", r"([^.]+)") + r"(?=\.|$)")

    def rename(name: str) -> str | None:
        match = pattern.match(name)
        if match is None:
            return None
        wildcards = iter(match.groups())
        return "".join(next(wildcards) if c == "*" else c for c in new) + name[match.end() :]

    return rename
