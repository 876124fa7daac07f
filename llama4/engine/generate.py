"""The loop of generation: a batch of prompts -> tokens and text, one event per token.

Shapes: B unfinished rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llama4.cache.sequence import SequenceCache
from llama4.engine.grammar import Matcher
from llama4.engine.prefill import prefill
from llama4.engine.runner import ModelRunner
from llama4.engine.sampling import RowState, Sampler, likeliest
from llama4.engine.tokens import Event, FinishReason, Token
from llama4.errors import ArgumentError, ContextLengthError, Llama4Error
from llama4.inputs import Inputs
from llama4.text.detokenizer import TextAssembler


class SupportsDecode(Protocol):
    """What generation asks of a tokenizer."""

    @property
    def special_tokens(self) -> dict[str, int]: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


def generate(
    runner: ModelRunner,
    tokenizer: SupportsDecode,
    inputs: Inputs,
    *,
    sampler: Sampler,
    matchers: Sequence[Matcher | None] = (),
    max_new_tokens: int = 256,
    top_logprobs: int = 0,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] | None = None,
    max_context: int | None = None,
    cache: SequenceCache | None = None,
    progress: bool = False,
) -> Iterator[Event]:
    """Continue every prompt of a batch until it stops by itself, at a stop string, or at a limit.

    Each row's result is that of the row alone, and a finished row costs nothing. Closing the iterator, or Ctrl-C,
    leaves the model as it was.

    Args:
        inputs: prompts as the processor makes them, padded on the left.
        matchers: of each row, what its reply must be; none for any text.
        top_logprobs: of how many of the most likely tokens each token tells the probability.
        stop_ids: tokens that end a reply; their text is not part of it.
        stop: strings that end a reply and are not part of it.
        max_context: most tokens of prompt and reply together; by default the model's window. A reply that reaches it
            ends with finish_reason "length".
        cache: keys and values of the beginnings of the prompts, the same number of tokens of each; the rest is added.
        progress: show a bar, where somebody sees it, while a long prompt is read.

    Returns:
        An iterator of one event per token and row, the rows in turn.

    Raises:
        ContextLengthError: a prompt leaves no room for a reply.
        Llama4Error: an argument out of its range.
    """
    stops = stop_strings(stop)
    lengths: list[int] = inputs.attention_mask.sum(dim=1).tolist()
    model = runner.model
    window = model.config.text.max_position_embeddings
    budgets = [reply_budget(length, max_new_tokens, window, max_context) for length in lengths]
    silent = frozenset(tokenizer.special_tokens.values())
    rows = [Row(i, budget, TextAssembler(stops)) for i, budget in enumerate(budgets)]
    cache = cache or model.new_cache(len(rows))
    pairs = zip(inputs.input_ids, inputs.attention_mask, strict=True)
    prompts = [ids_T[mask_T.bool()].tolist() for ids_T, mask_T in pairs]
    own = matchers or [None] * len(rows)
    states = [sampler.row(ids, stop_ids, matcher) for ids, matcher in zip(prompts, own, strict=True)]
    ends = frozenset(stop_ids)
    return _generate(runner, tokenizer, inputs, sampler, states, rows, ends, silent, cache, top_logprobs, progress)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The strings that end a reply, as a caller gives them.

    Raises:
        ArgumentError: an empty one.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise ArgumentError(
            "a stop string is empty; every text holds that, so give at least one character or none at all"
        )
    return stops


def reply_budget(prompt_length: int, max_new_tokens: int, window: int, max_context: int | None = None) -> int:
    """Most tokens of the reply to a prompt.

    Args:
        window: most tokens of prompt and reply together, where `max_context` does not say fewer.

    Raises:
        ContextLengthError: the prompt leaves no room for a reply.
        Llama4Error: an empty prompt, or no token wanted.
    """
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens is {max_new_tokens}; a reply has at least 1 token")
    if not prompt_length:
        raise Llama4Error("a prompt is empty: the checkpoint's chat template writes nothing for these messages")
    held = window if max_context is None else min(window, max_context)
    if prompt_length >= held:
        raise ContextLengthError(
            f"the prompt has {prompt_length} tokens, but the window holds {held}, reply included; shorten the prompt"
            + (f", or raise max_context={max_context}" if held == max_context else "")
        )
    return min(max_new_tokens, held - prompt_length)


@dataclass
class Row:
    """An unfinished reply: its tokens -> events.

    Attributes:
        index: of the reply in its batch.
        budget: how many tokens it may still have.
    """

    index: int
    budget: int
    text: TextAssembler

    def push(self, token: Token, ends: bool, silent: bool) -> Event:
        """Take one more token; `ends` says that it ends the reply, `silent` that it is no text."""
        self.budget -= 1
        text = self.text.flush() if silent and not ends else self.text.push(b"" if ends else token.bytes)
        reason: FinishReason | None = "stop" if ends or self.text.stopped else None if self.budget else "length"
        return Event(self.index, token, text + self.text.finish() if reason else text, reason)


def _generate(
    runner: ModelRunner,
    tokenizer: SupportsDecode,
    inputs: Inputs,
    sampler: Sampler,
    states: list[RowState],
    rows: list[Row],
    stop_ids: frozenset[int],
    silent_ids: frozenset[int],
    cache: SequenceCache,
    top_logprobs: int,
    progress: bool,
) -> Iterator[Event]:
    logits_BV = prefill(runner.model, inputs, cache, progress)
    runner.choose(cache)  # what it logs comes before the reply, not within
    ids_B, logprobs_B = sampler(logits_BV, states)
    ids, logprobs = ids_B.tolist(), logprobs_B.tolist()
    try:
        while True:
            live, others = [], likeliest(logits_BV, top_logprobs) if top_logprobs else None
            for i, (row, id_, logprob) in enumerate(zip(rows, ids, logprobs, strict=True)):
                if math.isnan(logprob):
                    raise Llama4Error(
                        f"the model's logits are not numbers in {runner.model.dtype}; load it with dtype='float32'"
                    )
                token = Token(id_, tokenizer.decode_bytes([id_]), logprob, others[i] if others else ())
                event = row.push(token, id_ in stop_ids, id_ in silent_ids)
                if event.finish_reason is None:
                    live.append(i)
                yield event
            if not live:
                return
            if len(live) < len(rows):
                rows, states = [rows[i] for i in live], [states[i] for i in live]
                ids = [ids[i] for i in live]
                cache.select_rows(live)
            ids, logprobs = runner.advance(ids, cache, sampler, states)
            logits_BV = runner.logits(cache) if top_logprobs else logits_BV
    finally:
        runner.release(cache)
