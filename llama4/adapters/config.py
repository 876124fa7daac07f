"""What of a model an adapter changes, and by how much."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama4.errors import ArgumentError

_LAYER = r"language_model\.model\.layers\.\d+\."
TARGETS = {
    "attention": _LAYER + r"(self|cross)_attn\.[qkvo]_proj",
    "experts": _LAYER + r"feed_forward\.experts\.(gate_up|down)_proj",
    "shared": _LAYER + r"feed_forward\.shared_expert\.(gate|up|down)_proj",
    "dense": _LAYER + r"feed_forward\.(gate|up|down)_proj",
    "router": _LAYER + r"feed_forward\.router",
    "vision": r"vision_model\.((model|(global_)?transformer)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.fc[12])|"
    r"vision_adapter\.mlp\.fc[12])",
    "projector": r"multi_modal_projector(\.linear_1)?",
    "embeddings": r"language_model\.(model\.embed_tokens|lm_head)",
}
"""Parts of the model that an adapter may change, as patterns of modules and of stacked experts' parameters."""
MAX_RANK = 4096
DEFAULT_TARGETS = ("attention", "experts", "shared", "dense")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): W x + scale * B A x, with A [rank, in] and B [out, rank] trained.

    Attributes:
        rank: of A and B.
        alpha: scale = alpha / rank; with `rslora` alpha / sqrt(rank) (Kalajdzievski 2023).
        targets: keys of `TARGETS`; those that the model has.
        ranks: of some targets, another rank; their scale is that of `rank`.
        dropout: share of a Linear's inputs that are zero for A in training. Experts have none: a row's score is in its
            inputs already, and PEFT has none there either.
        rslora: see `alpha`.

    Raises:
        ArgumentError: an unknown target, or a number that cannot be.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    ranks: Mapping[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(dict.fromkeys(self.targets)))
        for target in (*self.targets, *self.ranks):
            if target not in TARGETS:
                raise ArgumentError(f"target {target!r} is not known; choose of {', '.join(TARGETS)}")
        if not self.targets:
            raise ArgumentError(f"targets is empty; choose of {', '.join(TARGETS)}")
        for rank in (self.rank, *self.ranks.values()):
            if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
                raise ArgumentError(f"rank is {rank!r}; it must be a whole number from 1 to {MAX_RANK}")
        if not 0 < self.alpha < math.inf:
            raise ArgumentError(f"alpha is {self.alpha}; it must be more than 0")
        if not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    def rank_of(self, target: str) -> int:
        return self.ranks.get(target, self.rank)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def target_of(name: str) -> str | None:
    """The target that a module, or a parameter of stacked experts, belongs to."""
    return next((target for target, pattern in TARGETS.items() if re.fullmatch(pattern, name)), None)
