"""A batch of prompts -> tokens and text, one event per token, by a scheduler of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from llama4.cache.sequence import SequenceCache
from llama4.engine.grammar import Matcher
from llama4.engine.prefill import piece_size
from llama4.engine.prompt import split_rows
from llama4.engine.request import Delivery, Request
from llama4.engine.runner import ModelRunner
from llama4.engine.sampling import Sampler
from llama4.engine.scheduler import Scheduler
from llama4.engine.tokens import Event, FinishReason, SupportsDecode, Token
from llama4.errors import ArgumentError
from llama4.inputs import Inputs
from llama4.progress import Bar
from llama4.text.detokenizer import TextAssembler


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
    tokens: Sequence[Tensor] = (),
    cache: SequenceCache | None = None,
    progress: bool = False,
) -> Iterator[Event]:
    """Continue every prompt of a batch until it stops by itself, at a stop string, or at a limit.

    Each row's result is that of the row alone, and a finished row costs nothing. Closing the iterator, or Ctrl-C,
    leaves the model as it was.

    Args:
        inputs: prompts as the processor makes them, padded on the left.
        matchers: of each row, what its reply must be, or None for any text; by default any.
        top_logprobs: of how many of the most likely tokens each token tells the probability.
        stop_ids: tokens that end a reply; their text is not part of it.
        stop: strings that end a reply and are not part of it.
        max_context: most tokens of prompt and reply together; by default the model's window. A reply that reaches it
            ends with finish_reason "length".
        tokens: `identities` of each prompt, if they are known.
        cache: keys and values of the beginnings of the prompts, the same number of tokens of each; the rest is added.
        progress: show a bar, where somebody sees it, while a long prompt is read.

    Returns:
        An iterator of one event per token, those of each row in order.

    Raises:
        ContextLengthError: a prompt leaves no room for a reply.
        Llama4Error: an argument out of its range.
    """
    stops, silent = stop_strings(stop), frozenset(tokenizer.special_tokens.values())
    count, events = len(inputs.input_ids), deque[Event]()
    scheduler = Scheduler(
        runner,
        tokenizer,
        budget=piece_size(runner.model),
        max_batch=count,
        max_context=max_context,
        share_prefixes=False,
    )
    caches: Sequence[SequenceCache | None] = [*cache.split()] if cache is not None else [None] * count
    for row, prompt in enumerate(split_rows(runner.model, inputs)):
        budget = scheduler.reply_budget(prompt.input_ids.shape[1], max_new_tokens)
        reply = ReplyText(row, budget, TextAssembler(stops), frozenset(stop_ids), silent)
        request = Request(
            prompt,
            runner.model,
            sampler,
            max_new_tokens=budget,
            stop_ids=stop_ids,
            deliver=partial(_take, reply, events),
            alternatives=top_logprobs,
            matcher=matchers[row] if matchers else None,
            tokens=tokens[row] if tokens else None,
            cache=caches[row],
        )
        scheduler.add(request)
    return _generate(scheduler, events, cache, progress)


def _take(reply: ReplyText, events: deque[Event], delivery: Delivery) -> bool:
    """One more token of a reply, or why there is none; -> whether it is the last."""
    if isinstance(delivery, Exception):
        raise delivery
    events.append(event := reply.push(delivery))
    return event.finish_reason is not None


def _generate(
    scheduler: Scheduler, events: deque[Event], cache: SequenceCache | None, progress: bool
) -> Iterator[Event]:
    try:
        with Bar("reading", scheduler.num_unread, "tokens", shown=progress):
            while scheduler.is_reading:
                scheduler.step()
        for group in scheduler.running.groups:
            scheduler.runner.choose(group.own_cache)  # what it logs comes before the reply, not within
        while True:
            while events:
                yield events.popleft()
            if not scheduler.has_work:
                return
            scheduler.step()
    finally:
        if cache is not None:
            scheduler.runner.release(cache)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The strings that end a reply, as a caller gives them.

    Raises:
        ArgumentError: an empty one, or what is no text.
    """
    stops = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(stops, Collection) or not all(isinstance(each, str) for each in stops):
        raise ArgumentError(f"stop is {stop!r:.80}; it must be a text or a list of texts")
    if "" in stops:
        raise ArgumentError(
            "a stop string is empty; every text holds that, so give at least one character or none at all"
        )
    return tuple(stops)


@dataclass
class ReplyText:
    """An unfinished reply: its tokens -> events.

    Attributes:
        row: of the reply in its batch.
        budget: how many tokens it may still have.
        stop_ids: tokens that end it.
        silent_ids: tokens that are no text.
    """

    row: int
    budget: int
    text: TextAssembler
    stop_ids: frozenset[int]
    silent_ids: frozenset[int]

    def push(self, token: Token) -> Event:
        """Take one more token."""
        self.budget -= 1
        ends = token.id in self.stop_ids
        silent = token.id in self.silent_ids and not ends
        text = self.text.flush() if silent else self.text.push(b"" if ends else token.bytes)
        reason: FinishReason | None = "stop" if ends or self.text.stopped else None if self.budget else "length"
        return Event(self.row, token, text + self.text.finish() if reason else text, reason)
