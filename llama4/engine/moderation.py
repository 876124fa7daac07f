"""`Llama4.moderate`: a prompt of Llama Guard -> what it says of a message.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llama4.cache.sequence import SequenceCache
from llama4.config import PRESETS, Llama4Config
from llama4.engine.prefill import prefill
from llama4.engine.runner import ModelRunner
from llama4.engine.sampling import not_numbers
from llama4.errors import ArgumentError, Llama4Error
from llama4.inputs import Inputs, Processor
from llama4.text.guard import GUARDS, MARK, Category, Moderation, with_categories
from llama4.text.messages import Message, ParsedMessage
from llama4.text.prompt import Piece
from llama4.text.prompt_limit import PromptLimit
from llama4.text.template import ChatTemplate
from llama4.text.tokenizer import Tokenizer

MAX_REPLY = 64
"""Most tokens of an answer: blanks, "unsafe", and the ids of categories."""
_MAX_BLANK = 4


@dataclass(frozen=True)
class Asked:
    """What a guard is asked.

    Attributes:
        inputs: the prompt, one row.
        categories: those in it, by their ids.
        excluded: ids of others, which the model may name nevertheless.
    """

    inputs: Inputs
    categories: Mapping[str, Category]
    excluded: frozenset[str]


def is_guard(processor: Processor, config: Llama4Config) -> bool:
    """Whether a model says that it is a Llama Guard: by its chat template, or as it has Llama Guard 4's shape."""
    if _has_categories(processor.template):
        return True
    return config.family == "llama4" and config.num_parameters() == PRESETS["guard4"]().num_parameters()


def _has_categories(template: ChatTemplate | None) -> bool:
    return template is not None and any(MARK in source for source in template.sources.values())


def limit_of(config: Llama4Config, max_context: int | None) -> PromptLimit:
    """How many tokens a prompt may have."""
    window = config.text.max_position_embeddings
    held = min(window, max_context or window)
    return PromptLimit(held - MAX_REPLY, f"with an answer it may have {held}: moderate fewer messages")


def ask(
    processor: Processor,
    config: Llama4Config,
    messages: Sequence[Message],
    categories: Mapping[str, str] | None,
    excluded: Collection[str],
    guard: str | None,
    max_context: int | None = None,
) -> Asked:
    """The prompt of a conversation; arguments and errors are those of `Llama4.moderate`.

    Args:
        max_context: tokens of prompt and answer, where these are fewer than the window's.
    """
    row, tiles = processor.read(messages)
    pieces, names = with_categories(_format(processor, config, guard)(row), categories, excluded)
    return Asked(processor.pack(pieces, tiles, limit_of(config, max_context)), names, frozenset(excluded))


def _format(
    processor: Processor, config: Llama4Config, name: str | None
) -> Callable[[Sequence[ParsedMessage]], list[Piece]]:
    """How a model is asked: as `name` says, else as its own chat template writes.

    Raises:
        ArgumentError: an unknown name.
        Llama4Error: nothing says that the model is a guard.
    """
    if name is not None and name not in GUARDS:
        raise ArgumentError(f"guard={name!r} is not known; choose one of {', '.join(GUARDS)}")
    template, bos = processor.template, processor.tokenizer.bos
    if name is None and template is not None and _has_categories(template):
        return template.compose
    if name is None and is_guard(processor, config):
        name = "llama-guard-4"
    if name is None:
        raise Llama4Error(
            "nothing says that this model is a Llama Guard: it has no chat template with categories of unsafe content. "
            f"Load one that is, such as meta-llama/Llama-Guard-3-1B; if this is one, say which: "
            f"guard={' or '.join(map(repr, GUARDS))} (on the command line --guard)"
        )
    return partial(GUARDS[name].compose, bos=bos)


@torch.inference_mode()
def judge(
    runner: ModelRunner,
    tokenizer: Tokenizer,
    asked: Asked,
    cache: SequenceCache,
    threshold: float,
    stop_ids: Collection[int],
) -> Moderation:
    """What a guard answers to a prompt.

    The probability is that of "unsafe" as the first word: softmax of the logits z at the first token that is not white
    space, over the tokens U and S with which the tokenizer begins "unsafe" and "safe", with or without a blank before:
    sum(exp(z_U)) / (sum(exp(z_U)) + sum(exp(z_S))). So model cards of Llama Guard describe the score ("the probability
    for the first token").

    Args:
        cache: of the prompt's beginning, or empty; it is left with the prompt.
        threshold: probability from which the message is unsafe.

    Raises:
        Llama4Error: the logits are not numbers.
    """
    logits_V = prefill(runner.model, asked.inputs, cache)[0]
    length = cache.lengths[0]
    try:
        for _ in range(_MAX_BLANK):  # Llama 3's headers are followed by a line break, which some templates leave out
            first = int(logits_V.argmax())
            if tokenizer.decode_bytes([first]).strip():
                break
            logits_V = runner.step(torch.tensor([first]), cache)[0]
        safe, unsafe = (_spellings(word, tokenizer) for word in ("safe", "unsafe"))
        scores = torch.stack([logits_V[list(words)].float().logsumexp(0) for words in (safe, unsafe)])
        probability = float(scores.softmax(0)[1])
        if probability != probability:
            raise not_numbers(runner.model.dtype)
        if probability < threshold:
            return Moderation(True, probability, (), "safe", tuple(asked.categories.values()))
        begun = unsafe[max(unsafe, key=lambda first: float(logits_V[first]))]
        logits_V = runner.model(torch.tensor([begun]), cache=cache, last_only=True)[0, -1]
        listed = _line(runner, tokenizer, cache, logits_V, stop_ids)
    finally:
        runner.release(cache)
        cache.truncate(length)
    named = dict.fromkeys(listed.replace(",", " ").split())
    found = tuple(asked.categories[id_] for id_ in named if id_ in asked.categories)
    is_excluded = bool(named) and named.keys() <= asked.excluded
    return Moderation(is_excluded, probability, found, f"unsafe\n{listed}", tuple(asked.categories.values()))


def _spellings(word: str, tokenizer: Tokenizer) -> dict[int, list[int]]:
    """The tokens of a word and a line break, with and without a blank before it, by the first of them."""
    line = f"{word}\n"
    ways = (tokenizer.encode(line), tokenizer.encode(line, blank=False), tokenizer.encode(f" {line}"))
    return {ids[0]: ids for ids in reversed(ways) if tokenizer.decode_bytes(ids[:1]).strip()}


def _line(
    runner: ModelRunner, tokenizer: Tokenizer, cache: SequenceCache, logits_V: Tensor, stop_ids: Collection[int]
) -> str:
    """What the model goes on to write in the same line."""
    ends, ids = {*stop_ids, *tokenizer.special_tokens.values()}, list[int]()
    while len(ids) < MAX_REPLY and (token := int(logits_V.argmax())) not in ends:
        ids.append(token)
        if b"\n" in tokenizer.decode_bytes([token]):
            break
        logits_V = runner.step(torch.tensor([token]), cache)[0]
    return tokenizer.decode(ids).strip().partition("\n")[0]
