"""Logits -> token ids: greedy, or drawn with temperature, top-k, top-p and min-p; with penalties and biases or not.

Shapes: B rows, V vocabulary, K of its tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from llama4.config.generation import RANGES, GenerationConfig, check_setting, is_integer, is_number
from llama4.engine.grammar import Matcher
from llama4.engine.penalties import RowPenalties
from llama4.errors import ArgumentError, Llama4Error
from llama4.ops.sampling import Draw, draw_token, greedy_token


class SamplingOptions(TypedDict, total=False):
    """The fields of a `Sampler` as a caller gives them: None, or absent, where the checkpoint decides."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int | None
    seed: int | None


def not_numbers(dtype: torch.dtype) -> Llama4Error:
    """What to say where nothing can be chosen."""
    return Llama4Error(f"the model's logits are not numbers in {dtype}; load it with dtype='float32'")


@dataclass
class RowState:
    """What the choices in one row depend on, beside its logits.

    Attributes:
        generator: what is drawn with, one number for each token.
        prompt: its ids, for `repetition_penalty`.
        stop_ids: tokens that end the reply, for `min_tokens`.
        matcher: what the reply must be; None for any text.
        reply: the ids that were chosen.
    """

    generator: random.Random = field(default_factory=random.Random)
    prompt: Sequence[int] = ()
    stop_ids: Sequence[int] = ()
    matcher: Matcher | None = None
    reply: list[int] = field(default_factory=list)
    _seen_V: Tensor | None = None
    _counts_V: Tensor | None = None
    _penalties: RowPenalties | None = None

    def allows(self, id_: int) -> bool:
        """Whether the reply's form has this token next."""
        return self.matcher is None or self.matcher.allows(id_)

    def accept(self, id_: int) -> None:
        """A token that was chosen."""
        self.reply.append(id_)
        if self._seen_V is not None:
            self._seen_V[id_] = True
        if self._counts_V is not None:
            self._counts_V[id_] += 1
        if self._penalties is not None:
            self._penalties.accept(id_)
        if self.matcher is not None:
            self.matcher.accept(id_)

    def seen(self, like_V: Tensor) -> Tensor:
        """Whether prompt or reply hold a token, [V] bool."""
        if self._seen_V is None:
            self._seen_V = torch.zeros_like(like_V, dtype=torch.bool)
            ids = [id_ for id_ in (*self.prompt, *self.reply) if id_ < len(like_V)]  # others are never written
            self._seen_V[torch.tensor(ids, dtype=torch.long, device=like_V.device)] = True
        return self._seen_V

    def counts(self, like_V: Tensor) -> Tensor:
        """How often the reply holds a token, [V] float32."""
        if self._counts_V is None:
            self._counts_V = torch.zeros_like(like_V, dtype=torch.float32)
            for id_, count in Counter(self.reply).items():
                self._counts_V[id_] = count
        return self._counts_V

    def penalties(self, sampler: Sampler, vocab_size: int) -> RowPenalties:
        """What the sampler does to the row's logits."""
        if self._penalties is None:
            self._penalties = RowPenalties(
                float(sampler.repetition_penalty),
                float(sampler.presence_penalty),
                float(sampler.frequency_penalty),
                sampler.logit_bias,
                prompt=self.prompt,
                reply=self.reply,
                vocab_size=vocab_size,
                forbidden=self.stop_ids,
                min_tokens=sampler.min_tokens,
            )
        return self._penalties


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
        presence_penalty: what is then taken from the logits of tokens that the reply already holds (OpenAI's).
        frequency_penalty: the same, times how often it holds them.
        logit_bias: ids of tokens, and what is added to their logits; of each id once, in order.
        min_tokens: tokens before which none that ends the reply is chosen.

    Raises:
        Llama4Error: a setting out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in RANGES:
            if (value := getattr(self, name)) is not None:
                check_setting(name, value)
        for name in ("presence_penalty", "frequency_penalty"):
            if not is_number(value := getattr(self, name)) or not -2 <= value <= 2:
                raise ArgumentError(f"{name} is {value!r:.80}; it must be from -2 to 2, 0 for none")
        for id_, bias in self.logit_bias:
            if not is_number(bias) or not -100 <= bias <= 100:
                raise ArgumentError(f"logit_bias of token {id_} is {bias!r:.80}; it must be a number from -100 to 100")
        if not is_integer(self.min_tokens) or self.min_tokens < 0:
            raise ArgumentError(f"min_tokens is {self.min_tokens!r:.80}; it must be a whole number, 0 or more")
        if self.seed is not None and (not is_integer(self.seed) or self.seed < 0):
            raise ArgumentError(
                f"seed is {self.seed!r:.80}; it must be a whole number, 0 or more, or None for a fresh one"
            )

    @classmethod
    def from_options(cls, options: SamplingOptions, defaults: GenerationConfig) -> Sampler:
        """What a caller gives, else what the checkpoint says, else greedily; field by field.

        Raises:
            Llama4Error: an option out of its range, or its subclass `ConfigError`: see `GenerationConfig.sampling`.
        """
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if (bias := given.get("logit_bias")) is not None:
            try:
                given["logit_bias"] = tuple(sorted((int(str(id_)), value) for id_, value in bias.items()))
            except (AttributeError, TypeError, ValueError):
                wanted = "ids of tokens and a number for each, as {13: -100}"
                raise ArgumentError(f"logit_bias is {bias!r:.80}; it must be {wanted}") from None
        return cls(**{**defaults.sampling(), **given})

    @property
    def takes_largest(self) -> bool:
        """Whether the token chosen is that of the largest logit, as the model gave it, if the reply may be any text."""
        return self.temperature == 0 and not self._adjusts

    @property
    def draws_from_logits(self) -> bool:
        """Whether the token chosen is drawn from the logits, as the model gave them, if the reply may be any text."""
        return self.temperature != 0 and not self._adjusts

    @property
    def _adjusts(self) -> bool:
        has_penalty = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(has_penalty or self.logit_bias or self.min_tokens)

    def row(self, prompt: Sequence[int] = (), stop_ids: Sequence[int] = (), matcher: Matcher | None = None) -> RowState:
        """The state of a row that begins."""
        seed = None if self.seed is None else int(self.seed)
        return RowState(random.Random(seed), prompt, stop_ids, matcher)

    def draw(self, index: int, row: RowState) -> Draw:
        """What to draw the next token of a row with, which is at this index of the logits, without penalties."""
        uniform = row.generator.random()
        return Draw(index, int(self.top_k or 0), float(self.temperature), float(self.top_p), float(self.min_p), uniform)

    def penalised_draw(self, index: int, row: RowState, vocab_size: int) -> Draw:
        """The same with penalties and biases, for the compiled kernel; also of the most likely token."""
        penalties = row.penalties(self, vocab_size).address() if self._adjusts else 0
        if self.temperature == 0:
            return Draw(index, top_k=1, temperature=1.0, top_p=1.0, min_p=0.0, uniform=0.0, penalties=penalties)
        return self.draw(index, row)._replace(penalties=penalties)

    def __call__(self, logits_BV: Tensor, rows: Sequence[RowState]) -> tuple[Tensor, Tensor]:
        """Choose one token per row, and tell the rows.

        Returns:
            The ids [B], and their log-probabilities [B]: log_softmax(logits) in float32, before all settings.
        """
        assert len(rows) == len(logits_BV)
        ids_B, logprobs_B = self._choose(logits_BV, rows)
        for row, id_ in zip(rows, ids_B.tolist(), strict=True):
            row.accept(id_)
        return ids_B, logprobs_B

    def _choose(self, logits_BV: Tensor, rows: Sequence[RowState]) -> tuple[Tensor, Tensor]:
        has_form = any(row.matcher for row in rows)
        if self.takes_largest and not has_form:
            return greedy_token(logits_BV)
        logits_BV = logits_BV.float()
        scores_BV = self._adjusted(logits_BV, rows) if self._adjusts else logits_BV
        if has_form:
            pairs = zip(scores_BV, rows, strict=True)
            scores_BV = torch.stack([row.matcher.allow(row_V) if row.matcher else row_V for row_V, row in pairs])
        if self.temperature:
            drawn = draw_token(scores_BV, [self.draw(index, row) for index, row in enumerate(rows)])
            ids_B = torch.tensor([id_ for id_, _ in drawn], device=logits_BV.device)
        else:
            ids_B = scores_BV.argmax(dim=-1)
        return ids_B, logits_BV.log_softmax(dim=-1).gather(1, ids_B[:, None]).squeeze(1)

    def _adjusted(self, logits_BV: Tensor, rows: Sequence[RowState]) -> Tensor:
        """Scores [B, V], with all penalties and biases."""
        scores_BV = logits_BV.clone()
        for scores_V, row in zip(scores_BV, rows, strict=True):
            if (penalty := float(self.repetition_penalty)) != 1:
                penalised_V = torch.where(scores_V < 0, scores_V * penalty, scores_V / penalty)
                scores_V.copy_(torch.where(row.seen(scores_V), penalised_V, scores_V))
            if self.presence_penalty or self.frequency_penalty:
                counts_V = row.counts(scores_V)
                scores_V -= float(self.frequency_penalty) * counts_V + float(self.presence_penalty) * (counts_V > 0)
            for id_, bias in self.logit_bias:
                scores_V[id_] += bias
            if len(row.reply) < self.min_tokens:
                scores_V[list(row.stop_ids)] = -torch.inf
        return scores_BV


def likeliest(logits_BV: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Of each row the ids of so many of the most likely tokens, and log_softmax(logits) in float32 of each."""
    if not count:
        return [()] * len(logits_BV)
    values_BK, ids_BK = logits_BV.float().log_softmax(-1).topk(min(int(count), logits_BV.shape[1]))
    rows = zip(ids_BK.tolist(), values_BK.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]


def check_choice(sampler: Sampler, vocab_size: int, top_logprobs: int) -> None:
    """What only the vocabulary decides.

    Raises:
        ArgumentError: a token of `logit_bias`, or a number of alternatives, that it does not have.
    """
    if not is_integer(top_logprobs) or not 0 <= top_logprobs <= vocab_size:
        raise ArgumentError(f"top_logprobs is {top_logprobs!r:.80}; it must be a whole number from 0 to {vocab_size}")
    for id_, _ in sampler.logit_bias:
        if not 0 <= id_ < vocab_size:
            raise ArgumentError(f"logit_bias names token {id_}; ids are from 0 to {vocab_size - 1}")
