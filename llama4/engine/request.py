"""One prompt on its way to one reply, as the scheduler sees it: tokens in, tokens out.

Shapes: T tokens of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from llama4.adapters.by_row import NO_ADAPTER, RowAdapter
from llama4.cache.prefixes import next_key
from llama4.cache.sequence import SequenceCache
from llama4.config import CACHE_BLOCK
from llama4.config.generation import is_integer
from llama4.engine.grammar import Matcher
from llama4.engine.observers import Observer
from llama4.engine.prefix_cache import identities
from llama4.engine.prompt import Piece, PromptPictures
from llama4.engine.sampling import Sampler
from llama4.engine.tokens import Token
from llama4.errors import ArgumentError, Llama4Error
from llama4.inputs import Inputs
from llama4.model.multimodal import Llama4Model, check_ids
from llama4.text.prompt_limit import PromptLimit

Delivery = Token | Exception
"""What a request is given: its next token, or why there is none."""


@dataclass
class Times:
    """When things happened to a request, by `time.monotonic`; None if they have not."""

    arrival: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Request:
    """A prompt, how its reply is chosen, and how far it has come.

    Attributes:
        ids: of the prompt, and of the reply so far.
        tokens: the same as identities: what stands for a picture tells which picture.
        prompt_length: tokens of the prompt.
        computed: how many of `ids` have their keys and values in `cache`.
        given: what it will begin with, if not with a cache that the scheduler gives it.
        keeps_cache: whether it began with a cache of somebody who goes on with it.
        cache: of this request alone; None while it waits, and while it decodes in a cache with others.
        entered: how many of its blocks are in the index.
        own_blocks: the numbers of the blocks that it has entered there itself.
        arrival: a number that orders requests.
        choice: grouping key: requests with equal keys are sampled in one call.
        state: random generator, penalties and grammar of its reply.
        reused: tokens of the prompt that others had computed when it was read, as far as its first token.
    """

    def __init__(
        self,
        inputs: Inputs,
        model: Llama4Model,
        sampler: Sampler,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        deliver: Callable[[Delivery], bool | None],
        alternatives: int = 0,
        matcher: Matcher | None = None,
        observer: Observer | None = None,
        adapter: RowAdapter = NO_ADAPTER,
        tokens: Tensor | None = None,
        cache: SequenceCache | None = None,
    ) -> None:
        """
        Args:
            inputs: one prompt.
            max_new_tokens: most tokens of its reply, at least 1.
            stop_ids: tokens that end it.
            deliver: is called by the thread that computes, with every token as it comes; a token that ends the reply
                is the last, and so is one of which it says True. After an exception nothing follows.
            matcher: what its reply must be.
            alternatives: of how many of the most likely tokens it is told the probability.
            observer: is told the hidden states of the prompt as it is read.
            adapter: what it is computed with.
            tokens: `identities` of the prompt, if they are known, [T].
            cache: what it begins with, the beginning of its prompt or nothing; by default what the scheduler gives it.

        Raises:
            Llama4Error: ids outside the vocabulary, more or fewer patches than the tiles give.
        """
        own = tokens if tokens is not None else identities(inputs, model)[0]
        self.ids: list[int] = inputs.input_ids[0][inputs.attention_mask[0].bool()].tolist()
        assert self.ids, "reply_budget refuses empty prompts"
        check_ids(min(self.ids), max(self.ids), model.config.text.num_embeddings)
        self.tokens: list[int] = own.tolist()
        self.prompt_length = len(self.ids)
        self.sampler = sampler
        self.choice = replace(sampler, seed=None), matcher is None
        self.state = sampler.row(self.ids[:], tuple(stop_ids), matcher)
        self.max_new_tokens = max_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self.deliver = deliver
        self.alternatives = alternatives
        self.observer = observer
        self.adapter = adapter
        self.pictures = PromptPictures(model, inputs, self.ids)
        self.given, self.keeps_cache = cache, cache is not None
        self.cache: SequenceCache | None = None
        self.computed = 0
        self.entered = 0
        self.own_blocks = set[int]()
        scaling = model.config.text.rope_scaling
        rope_length = scaling.effective_length(self.prompt_length) if scaling is not None else 0
        # Blocks are shared where RoPE rotates them alike, and one adapter computed them.
        self._root = repr((rope_length, adapter.name, adapter.version)).encode()
        self._keys: list[bytes] = []
        self.arrival = 0
        self.reused = 0
        self.times = Times()

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 of a reply that is being decoded."""
        return len(self.ids) - self.computed

    @property
    def own_cache(self) -> SequenceCache:
        assert self.cache is not None, "it waits, or decodes with others"
        return self.cache

    def key(self, index: int) -> bytes:
        """The key in the prefix index of a full block; that before the first is empty."""
        while index >= len(self._keys):
            begin = len(self._keys) * CACHE_BLOCK
            previous = self._keys[-1] if self._keys else self._root
            self._keys.append(next_key(previous, self.tokens[begin : begin + CACHE_BLOCK]))
        return self._keys[index] if index >= 0 else b""

    def next_piece(self, size: int) -> Piece:
        """So many of the tokens that are missing."""
        return self.pictures.piece(self.ids, self.computed, self.computed + size)

    def begin(self, new_cache: Callable[[], SequenceCache], blocks: Sequence[Sequence[Tensor]]) -> None:
        """Begin with what was given, else with an empty cache, and in it what another request has computed: full
        blocks."""
        cache, self.given = self.given or new_cache(), None
        cache.announce([self.prompt_length])
        if blocks:
            cache.share(blocks)
        self.cache, self.entered, self.computed = cache, len(blocks), cache.lengths[0]
        if self.times.first_token is None:
            self.reused = self.computed - CACHE_BLOCK * len(self.own_blocks.intersection(range(len(blocks))))
        if self.observer is not None:
            self.observer.begin()

    def reset(self) -> None:
        """Forget what was computed, for others to have the memory."""
        self.cache, self.computed, self.entered = None, 0, 0
        self.pictures.forget()

    def add(self, token: Token) -> bool:
        """Take the next token of the reply; -> whether it is the last."""
        self.times.last_token = time.monotonic()
        self.times.first_token = self.times.first_token or self.times.last_token
        self.ids.append(token.id)
        self.tokens.append(token.id)
        ends = token.id in self.stop_ids or len(self.ids) - self.prompt_length == self.max_new_tokens
        return bool(self.deliver(token)) or ends


def reply_budget(prompt_length: int, max_new_tokens: int, limit: PromptLimit) -> int:
    """Most tokens of the reply to a prompt, which has a place for one beyond the longest prompt.

    Raises:
        ContextLengthError: the prompt leaves no room for a reply.
        Llama4Error: an empty prompt, or no token wanted.
    """
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens is {max_new_tokens!r:.80}; it must be a whole number, 1 or more")
    if not prompt_length:
        raise Llama4Error("a prompt is empty: the checkpoint's chat template writes nothing for these messages")
    limit.check(prompt_length)
    return min(int(max_new_tokens), limit.most + 1 - prompt_length)
