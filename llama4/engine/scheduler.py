"""Many requests in one model: at every step some join, some leave, and all that stay get a token.

A step is at most two forwards: one more token for each request that is decoding, and pieces of prompts, together
`budget` tokens at most. A prompt of any length so delays the others' next token by the time of one piece. Requests with
adapters, and those without, have forwards of their own (`adapters/by_row.py`).

Memory is a pool of blocks. Full blocks are entered in a `PrefixIndex`, and prompts that begin like them skip what is
there. When the pool is full, blocks that only the index holds go first, the least recently used before others; then the
youngest request is put back, and its tokens are read again when there is room. The oldest is never put back, so it
ends; then the next is the oldest.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.adapters.by_row import RowAdapters
from llama4.adapters.loaded import Adapters
from llama4.cache.pool import BlockPool
from llama4.cache.prefixes import is_shareable
from llama4.cache.sequence import SequenceCache
from llama4.config import CACHE_BLOCK
from llama4.config.window import SlidingWindow, ends_chunk, slot_of, slots_end
from llama4.engine.choice import next_tokens
from llama4.engine.prefill import head_of, piece_size, read_pieces
from llama4.engine.prompt import Piece
from llama4.engine.request import Delivery, Request, reply_budget
from llama4.engine.runner import ModelRunner
from llama4.engine.running import Group, Running
from llama4.engine.sampling import not_numbers
from llama4.engine.shared_blocks import SharedBlocks
from llama4.engine.tokens import SupportsDecode, Token
from llama4.errors import ArgumentError, ContextLengthError
from llama4.kernels import threads
from llama4.text.prompt_limit import PromptLimit
from llama4.units import bytes_text

BUDGET = 512
"""Tokens of one step, decoding and reading together."""
GPU_BUDGET = 4096
"""The same on a GPU, where all experts are read with each piece of a prompt. A guess: no server was timed there."""
MAX_BATCH = 64


@dataclass
class Counts:
    """What has happened since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


def default_budget(device: torch.device) -> int:
    return GPU_BUDGET if device.type == "cuda" else BUDGET


class Scheduler:
    """Who is computed when. One thread calls it.

    Attributes:
        pool: the memory of all keys and values.
        window: most tokens of a prompt and its reply together: the model's window, or what the pool holds of one.
        limit: how many tokens a prompt may have.
        counts: for those who watch.
        on_step: is told after every step how many tokens it computed.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: SupportsDecode,
        *,
        cache_memory: int | None = None,
        max_batch: int = MAX_BATCH,
        max_context: int | None = None,
        budget: int | None = None,
        new_cache: Callable[[BlockPool], SequenceCache] | None = None,
        adapters: RowAdapters | None = None,
        share_prefixes: bool = True,
    ) -> None:
        """
        Args:
            cache_memory: bytes of all keys and values; None for no limit.
            max_batch: most requests that are read and decoded at once.
            max_context: most tokens of prompt and reply; by default the model's window.
            budget: most tokens of a step; by default what suits the model's device.
            new_cache: makes an empty cache of one row; by default the model's own.
            adapters: those that requests may name.
            share_prefixes: whether what was read is kept for prompts that begin like it.

        Raises:
            ArgumentError: `max_batch` or `budget` below 1, or memory that does not hold one sequence of two tokens.
        """
        if budget is None:
            budget = default_budget(runner.model.device)
        for name, value in (("max_batch", max_batch), ("budget", budget)):
            if value < 1:
                raise ArgumentError(f"{name} is {value}; it must be at least 1")
        self.runner, self.tokenizer = runner, tokenizer
        self.max_batch, self.budget = max_batch, budget
        self.pool = BlockPool(cache_memory)
        self._new_cache = new_cache or (lambda pool: runner.model.new_cache(1, pool=pool))
        self._empty = self._new_cache(self.pool)
        self._adapters = adapters or RowAdapters(runner.model, Adapters(runner.model))
        window = runner.model.config.text.max_position_embeddings
        longest = min(max_context or window, window)
        self.window = self._window(longest)
        self.limit = PromptLimit.of_window(window, max_context)
        if self.window < longest:
            memory = f"cache_memory={bytes_text(cache_memory or 0)} holds {self.window} of one conversation"
            remedy = f"shorten the prompt, or raise cache_memory (the model's window holds {longest})"
            self.limit = PromptLimit(self.window - 1, f"{memory}, reply included; {remedy}")
        self._shares = share_prefixes and is_shareable(self._empty)
        self.shared = SharedBlocks(lambda: self._new_cache(self.pool), self._shares)
        self.index = self.shared.index
        self._windows = set(self._empty.windows)
        self.counts = Counts()
        self.waiting: deque[Request] = deque()  # the oldest first
        self.reading: list[Request] = []
        self.running = Running()
        self.on_step: Callable[[int], object] = lambda tokens: None
        self._arrivals = 0

    def _window(self, most: int) -> int:
        """The most tokens of one sequence that the pool holds."""
        if self.pool.limit is None or self._empty.num_bytes_of(most) <= self.pool.limit:
            return most
        blocks = most // CACHE_BLOCK
        while blocks and self._empty.num_bytes_of(blocks * CACHE_BLOCK) > self.pool.limit:
            blocks -= 1
        if not blocks:
            raise ArgumentError(
                f"cache_memory is {bytes_text(self.pool.limit)}; the least is "
                f"{bytes_text(self._empty.num_bytes_of(1))}, for {CACHE_BLOCK} tokens of one conversation"
            )
        return blocks * CACHE_BLOCK

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is not read to its end."""
        return bool(self.waiting or self.reading)

    @property
    def num_unread(self) -> int:
        """Tokens of prompts that wait, as far as they were not given."""
        return sum(each.missing - (each.given.lengths[0] if each.given else 0) for each in self.waiting)

    @property
    def has_work(self) -> bool:
        return self.is_reading or bool(self.running.requests)

    def reply_budget(self, prompt_length: int, max_new_tokens: int) -> int:
        """Most tokens of the reply to a prompt.

        Raises:
            ContextLengthError: the prompt leaves no room for a reply, in memory or in the window.
            Llama4Error: an empty prompt, or no token wanted.
        """
        return reply_budget(prompt_length, max_new_tokens, self.limit)

    def check(self, request: Request) -> None:
        """Raises:
        ContextLengthError: the memory does not hold a request with its pictures.
        """
        most = request.prompt_length + request.max_new_tokens
        needed = self._empty.num_bytes_of(most) + self._picture_bytes(request, 0, most)
        if needed > (self.pool.limit or needed):
            raise ContextLengthError(
                f"prompt, pictures and reply take {bytes_text(needed)}, and cache_memory is "
                f"{bytes_text(self.pool.limit or 0)}; raise it, or send fewer pictures"
            )

    def _picture_bytes(self, request: Request, begin: int, end: int) -> int:
        """What layers of cross-attention keep of the pictures among these tokens."""
        return request.pictures.keys(begin, end) * self._empty.picture_bytes

    def add(self, request: Request) -> None:
        """Take a request. Prompt and reply together are at most `window` tokens."""
        assert request.prompt_length + request.max_new_tokens <= self.window
        self._arrivals += 1
        request.arrival = self._arrivals
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is; its memory is free at once."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.reading:
            self.reading.remove(request)
        elif request in self.running.requests:
            self.running.remove(request)
        request.reset()

    def fail_all(self, error: Exception) -> None:
        """Forget all requests, and tell them why."""
        self._fail([*self.waiting, *self.reading, *self.running.requests], error)

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for all that decode, and some tokens of prompts. An error that a request causes is delivered
        to it, or to those that were computed with it, and the others go on."""
        before = self.counts.prompt_tokens
        decoded = self._decode()
        self._admit()
        self._read(max(self.budget - decoded, 1))
        self.counts.steps += 1
        self.on_step(decoded + self.counts.prompt_tokens - before)

    def _decode(self) -> int:
        self._make_room_to_decode()
        return sum(map(self._decode_group, self.running.groups))

    def _decode_group(self, group: Group) -> int:
        requests = list(group.requests)
        try:
            with self._adapters.computing([(request.adapter, 1) for request in requests]):
                chosen = self._advance(requests, group.own_cache)
        except Exception as error:
            self._fail(requests, error)
            return 0
        pairs = zip(requests, chosen, strict=True)
        group.keep([row for row, (request, token) in enumerate(pairs) if not self._deliver(request, token)])
        return len(requests)

    def _advance(self, requests: Sequence[Request], cache: SequenceCache) -> list[Delivery]:
        """Compute one more token of each request of a group."""
        session = self.runner.run([request.ids[-1] for request in requests], cache)
        greedy = session.greedy_token() if any(each.sampler.takes_largest for each in requests) else None
        for row, request in enumerate(requests):
            request.computed += 1
            self._settle(request, cache, row)
        with threads.torch_by_one_thread() if session.logits_BV.is_cpu else nullcontext():
            return next_tokens(requests, session.logits_BV, self.tokenizer, greedy)

    def _make_room_to_decode(self) -> None:
        while self.pool.limit is not None and (groups := self.running.groups):
            caches = [group.own_cache for group in groups]
            if self._has_room(sum(cache.growth(row, 1) for cache in caches for row in range(cache.batch_size))):
                return
            self._put_back_youngest()

    def _has_room(self, needed: int) -> bool:
        """Whether so many bytes can be had without putting anybody back."""
        while self.pool.free < needed:
            if not self.index.evict():
                return False
        return True

    def _put_back_youngest(self) -> Request:
        admitted = (*self.reading, *self.running.requests)
        assert len(admitted) > 1, "the pool holds less than one request"
        request = max(admitted, key=lambda each: each.arrival)
        self.cancel(request)
        self.waiting.appendleft(request)  # who waits is younger: the oldest that waited was taken first
        self.counts.preemptions += 1
        return request

    def _admit(self) -> None:
        """Begin to read the prompts that have waited longest, while there is room for each as a whole."""
        while self.waiting and len(self.reading) + len(self.running.requests) < self.max_batch:
            request = self.waiting[0]
            self.shared.begin(request)
            others = self.reading or self.running.requests
            whole = self._left_to_take(request) + sum(map(self._left_to_take, self.reading))
            if others and not self._has_room(whole):
                request.reset()
                return
            self.waiting.popleft()
            self.reading.append(request)
            request.times.started = request.times.started or time.monotonic()
            if not request.missing:  # the very prompt that was read last
                logits_1V = request.own_cache.logits_after(request.computed)
                assert logits_1V is not None
                self._choose_first([request], logits_1V)

    def _left_to_take(self, request: Request) -> int:
        """Bytes that reading the rest of a prompt takes."""
        tokens = self._empty.num_bytes_of(len(request.ids)) - self._empty.num_bytes_of(request.computed)
        return tokens + self._picture_bytes(request, request.computed, len(request.ids))

    def _read(self, budget: int) -> None:
        """Read pieces of prompts, chosen so that no prompt waits for ever and a short one does not wait for a long one:
        half of the budget goes to the oldest, the rest to those with the least left to read."""
        if not self.reading:
            return
        readers = self.shared.readers(sorted(self.reading, key=lambda each: each.arrival))
        left = min(budget, piece_size(self.runner.model))
        oldest, rest = readers[0], sorted(readers[1:], key=lambda each: each.missing)
        pieces = {oldest: min(oldest.missing, -(-left // 2) if rest else left)}
        left -= pieces[oldest]
        for request in rest:
            pieces[request] = min(request.missing, left)
            left -= pieces[request]
        pieces[oldest] += min(left, oldest.missing - pieces[oldest])
        if self.running.groups:  # who wait for their next token
            pieces = {each: each.pictures.up_to_second(each.computed, size) for each, size in pieces.items()}
        self._read_pieces({each: self._within_chunks(each, size) for each, size in pieces.items() if size})

    def _within_chunks(self, request: Request, size: int) -> int:
        """A piece ends with a chunk, or with a round of a ring, at the latest: its blocks are then still there, to be
        entered in the index, and what it takes of a limited pool is what `growth` says. Where there is no room for
        that, and a ring has come round, it ends with a block, too: one is copied at a time."""
        if not self._shares and self.pool.limit is None:
            return size
        begin = request.computed
        ends = [end for window in self._windows if (end := slots_end(begin, window)) is not None]
        size = min([size, *(end - begin for end in ends)])
        if self.pool.free >= self._growth(request, size):
            return size
        rings = [window for window in self._windows if isinstance(window, SlidingWindow) and begin >= window]
        return min([size, *(CACHE_BLOCK - slot_of(begin, window) % CACHE_BLOCK for window in rings)])

    def _read_pieces(self, pieces: dict[Request, int]) -> None:
        while not self._has_room(sum(self._growth(each, size) for each, size in pieces.items())):
            pieces.pop(self._put_back_youngest(), None)
        groups: dict[tuple[str, ...], dict[Request, int]] = {}
        for request in sorted(pieces, key=lambda each: each.adapter):  # its sort is stable
            groups.setdefault(request.adapter.modules, {})[request] = pieces[request]
        for group in groups.values():
            self._read_group(group)

    def _read_group(self, pieces: dict[Request, int]) -> None:
        """Read pieces of prompts in one forward."""
        whole: dict[Request, Piece] = {}
        for request, size in pieces.items():
            try:
                with self._adapters.computing([(request.adapter, size)]):
                    whole[request] = request.next_piece(size)
            except Exception as error:
                self._fail([request], error)
        if whole:
            self._forward(whole)

    def _growth(self, request: Request, size: int) -> int:
        """Bytes that the next piece of a prompt takes."""
        pictures = self._picture_bytes(request, request.computed, request.computed + size)
        return request.own_cache.growth(0, size) + pictures

    def _forward(self, pieces: dict[Request, Piece]) -> None:
        """Compute a piece of each prompt; those that are read to the end get their first token."""
        requests = list(pieces)
        try:
            logits_BV = self._compute(pieces)
        except Exception as error:
            self._fail(requests, error)
            return
        rows = [row for row, request in enumerate(requests) if not request.missing]
        if rows:
            self._choose_first([requests[row] for row in rows], logits_BV[rows])

    def _choose_first(self, requests: Sequence[Request], logits_BV: Tensor) -> None:
        """The first token of requests whose prompts are read; they then decode."""
        try:
            chosen = next_tokens(requests, logits_BV, self.tokenizer)
        except Exception as error:
            self._fail(requests, error)
            return
        for row, (request, token) in enumerate(zip(requests, chosen, strict=True)):
            if request.times.first_token is None:
                self.counts.prefix_queries += request.prompt_length
                self.counts.prefix_hits += request.reused
            if request.keeps_cache:
                request.own_cache.remember_logits(logits_BV[row : row + 1])
            self.reading.remove(request)
            if not self._deliver(request, token):
                self.running.join(request)

    def _compute(self, pieces: dict[Request, Piece]) -> Tensor:
        """Logits behind each piece, [B, V]."""
        model, requests = self.runner.model, list(pieces)
        cache = SequenceCache.join([request.own_cache for request in requests])
        sizes = [len(piece.ids) for piece in pieces.values()]
        parts = [(request.adapter, size) for request, size in zip(requests, sizes, strict=True)]
        with self._adapters.computing(parts) as go_on_with:

            def head(x_BD: Tensor) -> Tensor:
                go_on_with([(request.adapter, 1) for request in requests])
                return model.language_model.lm_head(x_BD)

            x_ND, logits_BV = read_pieces(self.runner.fused, cache, list(pieces.values()), head)
            for request, own_ND in zip(requests, x_ND.split(sizes), strict=True):
                if request.observer is not None:
                    go_on_with([(request.adapter, len(own_ND))])
                    request.observer.read(own_ND, request.ids, request.computed, head_of(model))
        for request, own, size in zip(requests, cache.split(), sizes, strict=True):
            request.cache = own
            request.computed += size
            self.counts.prompt_tokens += size
            self._settle(request, own, 0)
        return logits_BV

    def _settle(self, request: Request, cache: SequenceCache, row: int) -> None:
        """What follows when tokens of a row were computed: blocks that are full are entered in the index, chunks that
        have ended are dropped."""
        self.shared.enter(request, cache, row)
        if any(ends_chunk(request.computed, window) for window in self._windows):
            cache.drop_chunks(row)

    def _deliver(self, request: Request, token: Delivery) -> bool:
        """Give a request its next token, or tell it why there is none; -> whether it has ended."""
        if isinstance(token, Token) and math.isnan(token.logprob):
            token = not_numbers(self.runner.model.dtype)
        if isinstance(token, Exception):
            request.reset()
            request.deliver(token)
            return True
        self.counts.generated_tokens += 1
        ended = request.add(token)
        if ended:
            request.reset()
        return ended

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Tell requests why they have no reply.

        Who catches or tells an error holds no cache: those who ask may keep it, and with it the frames it went through.
        """
        _clear_frames(error)
        for request in requests:
            self.cancel(request)
            request.deliver(error)


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the functions that an error ended had at hand: blocks of the pool, among others."""
    seen = set[int]()  # an error may be among its own causes
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
