"""Logits -> token ids: greedy, or drawn with temperature, top-k and top-p.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.ops.sampling import greedy_token


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Each row draws from a generator of its own, one uniform number per token, on the host: a row of a batch gets what it
    gets alone, and a seed means the same on every device.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token, whatever the other settings.
        top_p: draw from the fewest most likely tokens whose probabilities, after temperature and top_k, sum to this.
        top_k: draw from this many most likely tokens; None for all.
        seed: of every row's generator; None for a fresh one.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for all tokens")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more, or None for a fresh one")

    def generators(self, batch_size: int) -> list[random.Random]:
        """One generator per row, all with the same seed."""
        return [random.Random(self.seed) for _ in range(batch_size)]

    def __call__(self, logits_BV: Tensor, generators: Sequence[random.Random]) -> tuple[Tensor, Tensor]:
        """Choose one token per row.

        Returns:
            The ids [B], and their log-probabilities [B]: log_softmax(logits) in float32, before temperature, top_p and
            top_k.
        """
        assert len(generators) == len(logits_BV)
        if self.temperature == 0:
            return greedy_token(logits_BV)
        logits_BV = logits_BV.float()
        ids_B = self._draw(logits_BV, generators)
        return ids_B, logits_BV.log_softmax(dim=-1).gather(1, ids_B[:, None]).squeeze(1)

    def _draw(self, logits_BV: Tensor, generators: Sequence[random.Random]) -> Tensor:
        """Inverse transform sampling, in order of id, over the tokens that top_k and top_p leave."""
        # The largest logit is subtracted first, so that no temperature, however small, overflows.
        weights_BV = ((logits_BV - logits_BV.amax(dim=-1, keepdim=True)).double() / self.temperature).exp()
        if self.top_k is not None or self.top_p < 1:
            weights_BV = self._cut(weights_BV, logits_BV.argsort(dim=-1, descending=True, stable=True))
        sums_BV = weights_BV.cumsum(dim=-1)
        totals_B1 = sums_BV[:, -1:]
        uniform_B1 = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
        targets_B1 = uniform_B1.to(totals_B1.device) * totals_B1
        below_B1 = targets_B1.minimum(totals_B1.nextafter(torch.zeros_like(totals_B1)))  # however the product rounds
        return torch.searchsorted(sums_BV, below_B1, right=True).squeeze(1)

    def _cut(self, weights_BV: Tensor, order_BV: Tensor) -> Tensor:
        """Zero what is not among the top_k, nor among those of them that it takes to reach top_p of their sum."""
        ranked_BV = weights_BV.gather(1, order_BV)
        ranked_BV[:, self.top_k or ranked_BV.shape[1] :] = 0
        if self.top_p < 1:
            sums_BV = ranked_BV.cumsum(dim=-1)
            ranked_BV[sums_BV - ranked_BV >= self.top_p * sums_BV[:, -1:]] = 0  # those before it suffice
        return torch.zeros_like(weights_BV).scatter(1, order_BV, ranked_BV)
