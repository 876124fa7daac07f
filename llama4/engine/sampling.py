"""Logits -> token ids: greedy, or drawn with temperature, top-k, top-p and min-p; with a penalty on repetition or not.

Shapes: B rows, V vocabulary, K or F of its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from llama4.config.generation import RANGES, GenerationConfig, check_setting
from llama4.engine.grammar import Matcher
from llama4.errors import ArgumentError
from llama4.ops.sampling import greedy_token


class SamplingOptions(TypedDict, total=False):
    """The fields of a `Sampler` as a caller gives them: None, or absent, where the checkpoint decides."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Each row draws from a generator of its own, one uniform number per token, on the host: a row of a batch gets what it
    gets alone, and a seed means the same on every device.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token, whatever top_p, top_k and min_p.
        top_p: draw from the fewest most likely tokens whose probabilities, after temperature and top_k, sum to this.
        top_k: draw from this many most likely tokens; None for all.
        seed: of every row's generator; None for a fresh one.
        min_p: draw from tokens at least so likely, after temperature, as this share of the most likely one.
        repetition_penalty: logits of tokens that prompt or reply already hold are divided by this if positive, else
            multiplied, before all else (CTRL, arXiv 1909.05858, as in transformers); 1 for none.

    Raises:
        Llama4Error: a setting out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in RANGES:
            if (value := getattr(self, name)) is not None:
                check_setting(name, value)
        if self.seed is not None and self.seed < 0:
            raise ArgumentError(f"seed is {self.seed}; it must be 0 or more, or None for a fresh one")

    @classmethod
    def from_options(cls, options: SamplingOptions, defaults: GenerationConfig) -> Sampler:
        """What a caller gives, else what the checkpoint says, else greedily; field by field.

        Raises:
            Llama4Error: an option out of its range, or its subclass `ConfigError`: see `GenerationConfig.sampling`.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**{**defaults.sampling(), **given})

    @property
    def takes_largest(self) -> bool:
        """Whether the token chosen is that of the largest logit, as the model gave it."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def generators(self, batch_size: int) -> list[random.Random]:
        """One generator per row, all with the same seed."""
        return [random.Random(self.seed) for _ in range(batch_size)]

    def seen_tokens(self, logits_BV: Tensor, prompts: Iterable[Tensor]) -> Tensor | None:
        """The tokens of each prompt, ids [T], as a mask [B, V] for `repetition_penalty`; None if there is none."""
        if self.repetition_penalty == 1:
            return None
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for seen_V, ids_T in zip(seen_BV, prompts, strict=True):
            seen_V[ids_T.to(seen_V.device)] = True
        return seen_BV

    def __call__(
        self,
        logits_BV: Tensor,
        generators: Sequence[random.Random],
        seen_BV: Tensor | None = None,
        matchers: Sequence[Matcher | None] = (),
    ) -> tuple[Tensor, Tensor]:
        """Choose one token per row.

        Args:
            seen_BV: from `seen_tokens`; the tokens chosen are added to it.
            matchers: of each row, what its reply must be; they are told the tokens chosen.

        Returns:
            The ids [B], and their log-probabilities [B]: log_softmax(logits) in float32, before all settings.
        """
        assert len(generators) == len(logits_BV)
        assert (seen_BV is None) == (self.repetition_penalty == 1)
        if self.takes_largest and not any(matchers):
            return greedy_token(logits_BV)
        logits_BV = logits_BV.float()
        scores_BV = logits_BV
        if seen_BV is not None:
            penalty = float(self.repetition_penalty)
            penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
            scores_BV = torch.where(seen_BV, penalised_BV, logits_BV)
        if any(matchers):
            rows = zip(scores_BV, matchers, strict=True)
            scores_BV = torch.stack([matcher.allow(row_V) if matcher else row_V for row_V, matcher in rows])
        ids_B = self._draw(scores_BV, generators) if self.temperature else scores_BV.argmax(dim=-1)
        if seen_BV is not None:
            seen_BV.scatter_(1, ids_B[:, None], True)
        for matcher, id_ in zip(matchers, ids_B.tolist(), strict=False):
            if matcher is not None:
                matcher.accept(id_)
        return ids_B, logits_BV.log_softmax(dim=-1).gather(1, ids_B[:, None]).squeeze(1)

    def _draw(self, scores_BV: Tensor, generators: Sequence[random.Random]) -> Tensor:
        """Inverse transform sampling, in order of id, over the tokens that top_k, top_p and min_p leave."""
        # The largest score is subtracted first, so that no temperature, however small, overflows.
        shifted_BV = scores_BV - scores_BV.amax(dim=-1, keepdim=True)
        ids_BK = largest(scores_BV, self.top_k or scores_BV.shape[1])
        weights_BK = (shifted_BV.gather(1, ids_BK).double() / float(self.temperature)).exp()
        if self.top_p < 1:
            chosen_BK, weights_BK = nucleus(weights_BK, self.top_p)
            ids_BK = ids_BK.gather(1, chosen_BK)
        sums_BK = weights_BK.masked_fill(weights_BK < self.min_p, 0).cumsum(dim=-1)  # the largest weight is 1
        totals_B1 = sums_BK[:, -1:]
        uniform_B1 = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
        targets_B1 = uniform_B1.to(totals_B1.device) * totals_B1
        below_B1 = targets_B1.minimum(totals_B1.nextafter(torch.zeros_like(totals_B1)))  # however the product rounds
        drawn_B1 = torch.searchsorted(sums_BK, below_B1, right=True).clamp(max=sums_BK.shape[1] - 1)  # NaN, too
        return ids_BK.gather(1, drawn_B1).squeeze(1)


def largest(values_BK: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest values in order, [B, count]; of equal values the first."""
    if count >= values_BK.shape[1]:
        return torch.arange(values_BK.shape[1], device=values_BK.device).expand_as(values_BK)
    least_B1 = values_BK.topk(count, sorted=False).values.amin(dim=-1, keepdim=True)
    above_BK = values_BK > least_B1
    equal_BK = ~(above_BK | (values_BK < least_B1))  # or NaN
    chosen_BK = equal_BK & (equal_BK.cumsum(dim=-1) <= count - above_BK.sum(dim=-1, keepdim=True))
    return (above_BK | chosen_BK).nonzero()[:, 1].view(-1, count)


def nucleus(weights_BK: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of each row the fewest largest weights that sum to this share of all: indices in order, and the weights there,
    some of which are 0."""
    needed_B1 = share * weights_BK.sum(dim=-1, keepdim=True)
    for count in (FEW, weights_BK.shape[1]):
        indices_BF = largest(weights_BK, count)
        found_BF = weights_BK.gather(1, indices_BF)
        if (found_BF.sum(dim=-1, keepdim=True) >= needed_B1).all():
            break
    order_BF = found_BF.argsort(dim=-1, descending=True, stable=True)
    ranked_BF = found_BF.gather(1, order_BF)
    ranked_BF[ranked_BF.cumsum(dim=-1) - ranked_BF >= needed_B1] = 0  # those before it suffice
    return indices_BF, found_BF.scatter(1, order_BF, ranked_BF)


FEW = 1024
"""Among so many of the most likely tokens is nearly always all that top_p leaves. To sort 200,000 takes 60 ms."""
