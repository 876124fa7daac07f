"""What a step of `llama4 bench finetune` is of, for both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama4.config import Llama4Config

TARGETS = ("attention", "experts", "shared")
"""Of the adapter."""
RATE = 1e-4


@dataclass(frozen=True)
class Task:
    """What a step is of."""

    config: Llama4Config
    rows: int
    length: int
    rank: int
    threads: int

    def ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.config.text.vocab_size, (self.rows, self.length), generator=generator)

    @property
    def tokens(self) -> int:
        return self.rows * self.length
