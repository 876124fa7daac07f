"""`Engine`: one model for many at once, from asyncio or from threads.

    engine = Engine(llm)
    async for piece in engine.stream("Hello"):
        print(piece)
    reply = await engine.chat(messages)

One thread owns the model and runs the scheduler. Prompts are prepared (pictures read, text tokenized) and tokens made
text by whoever asks, so that neither keeps the model waiting. For asyncio prompts are prepared in threads: those with
pictures, which may take long to come, in threads of their own, and those whose replies have a form, which may take long
to read.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import TypeVar, Unpack

from llama4.adapters.by_row import RowAdapters
from llama4.api import Llama4
from llama4.engine.generate import ReplyText
from llama4.engine.observers import Observer
from llama4.engine.replies import Delta, Reply, ReplyBuilder, TextDelta
from llama4.engine.request import Delivery, Request
from llama4.engine.scheduler import MAX_BATCH, Scheduler
from llama4.engine.tokens import Token
from llama4.errors import ArgumentError, BusyError, Llama4Error
from llama4.options import Options, Prepared, Prompt, choice_of, conversation_rows
from llama4.serve.mailbox import Mailbox
from llama4.serve.preparation import Preparation
from llama4.serve.worker import Worker
from llama4.text.detokenizer import TextAssembler
from llama4.text.messages import Message, is_fetched, picture_parts
from llama4.units import parse_bytes

MAX_DOWNLOADS = 64
"""Prompts whose pictures are fetched at once."""
MAX_FORMS = 2
"""Prompts whose replies have a form that are prepared at once: forms are read beside the model, on its processors."""

T = TypeVar("T")


class Engine:
    """Answers many conversations at once: requests join and leave at every token.

    A reply's tokens are those of `llm.chat` alone, whatever runs beside it. While an engine is open the model is its
    own: do not call `llm` itself. Close it, or use it in `with` or `async with`.

    Attributes:
        llm: the model.
        scheduler: who is computed when; its counts may be read.
    """

    def __init__(
        self,
        llm: Llama4,
        cache_memory: int | str | None = "4GiB",
        max_batch: int = MAX_BATCH,
        max_waiting: int | None = None,
    ) -> None:
        """
        Args:
            cache_memory: what all keys and values take at most, in bytes or "4GiB"; None for no limit. It is taken as
                it is needed, and bounds the length of one conversation.
            max_batch: most conversations that are computed at once; others wait.
            max_waiting: most that wait; None for any number.

        Raises:
            ArgumentError: `max_batch` below 1, `max_waiting` below 1, or memory too small for a single conversation.
        """
        if max_waiting is not None and max_waiting < 1:
            raise ArgumentError(f"max_waiting is {max_waiting}; it must be at least 1, or None for any number")
        limit = parse_bytes(cache_memory) if isinstance(cache_memory, str) else cache_memory
        self.llm, self.max_waiting = llm, max_waiting
        self._adapters, self._usual_adapter = RowAdapters(llm.model, llm.adapters), llm.adapters.active
        self.scheduler = Scheduler(
            llm.runner,
            llm.tokenizer,
            cache_memory=limit,
            max_batch=max_batch,
            max_context=llm.max_context,
            new_cache=lambda pool: llm.model.new_cache(1, llm.cache_dtype, llm.cache_device, pool),
            adapters=self._adapters,
        )
        self.silent_ids = frozenset(llm.tokenizer.special_tokens.values())
        self._process = os.getpid()
        self._worker = Worker(self.scheduler)
        self._pictures = ThreadPoolExecutor(thread_name_prefix="llama4 pictures")
        self._forms = ThreadPoolExecutor(MAX_FORMS, thread_name_prefix="llama4 forms")
        self._downloads = ThreadPoolExecutor(MAX_DOWNLOADS, thread_name_prefix="llama4 downloads")
        weakref.finalize(self, self._worker.stop).atexit = False

    def stream(
        self,
        messages: Prompt,
        *,
        adapter: str | None = None,
        parallel_tool_calls: bool = True,
        **options: Unpack[Options],
    ) -> EngineStream:
        """Answer a conversation piece by piece. Other arguments are those of `Llama4.chat`; errors come with the first
        piece.

        Iterate with `async for` or, in a thread that may wait, with `for`. To leave the loop and let go of the stream,
        or to call `cancel`, stops the model within one token.

        Args:
            adapter: the name of one of `llm.adapters`, with which this reply is computed; None for that which the model
                was set to when the engine was made, or none.
            parallel_tool_calls: False ends the reply with its first tool call.
        """
        preparation = self._preparation(messages, options)
        return EngineStream(self, preparation, options.get("seed"), adapter, parallel_tool_calls=parallel_tool_calls)

    def observe(
        self, messages: Prompt, observer: Observer, *, adapter: str | None = None, **options: Unpack[Options]
    ) -> EngineStream:
        """`stream`, with an observer that learns of the prompt what it is for; it knows all with the first piece."""
        return EngineStream(self, self._preparation(messages, options), options.get("seed"), adapter, observer)

    def _preparation(self, messages: Prompt, options: Options) -> Preparation:
        return Preparation(self.llm, messages, options, self.scheduler.limit)

    async def chat(self, messages: Prompt, *, adapter: str | None = None, **options: Unpack[Options]) -> Reply:
        """Answer a conversation; a task that is cancelled cancels the reply."""
        stream = self.stream(messages, adapter=adapter, **options)
        async for _ in stream:
            pass
        return stream.reply

    def chat_batch(
        self,
        conversations: Sequence[str | Sequence[Message]],
        *,
        adapter: str | None = None,
        **options: Unpack[Options],
    ) -> list[Reply]:
        """Answer conversations at once, from a thread that may wait; each reply is what `Llama4.chat` gives."""
        streams = [self.stream(each, adapter=adapter, **options) for each in conversation_rows(conversations)]
        if not streams:
            choice_of(options, self.llm.generation_config, self.llm.config.text.vocab_size)  # raises, as with rows
        try:
            for stream in streams:
                stream.open(may_wait=True)
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for stream in streams:  # after an error; those that have ended are not changed
                stream.cancel()
        return [stream.reply for stream in streams]

    async def in_thread(self, messages: object, work: Callable[[], T], has_form: bool = False) -> T:
        """The result of some work on a prompt, in a thread: one that waits for pictures keeps no texts waiting, one
        that fetches them no other pictures, and one that reads a form only other forms.

        Raises:
            BusyError: the engine closed.
            Llama4Error: it is the engine of a process that this one was forked from.
        """
        self.check_process()
        pictures, loop = list(picture_parts(messages)), asyncio.get_running_loop()
        pool = self._forms if has_form else self._pictures if pictures else None
        pool = self._downloads if any(map(is_fetched, pictures)) else pool

        def run() -> T:
            self._worker.check_open()  # what still waited for a thread is not begun
            return work()

        try:
            result = loop.run_in_executor(pool, copy_context().run, run)
        except RuntimeError:  # the pool was shut down
            self._worker.check_open()
            raise
        return await result

    @property
    def num_waiting(self) -> int:
        """Requests that nothing was computed of yet."""
        return len(self.scheduler.waiting) + self._worker.commands.qsize()

    def close(self) -> None:
        """Stop; replies that are not complete end with a `BusyError`. In a process that was forked from the engine's
        there is nothing to stop."""
        if os.getpid() != self._process:
            return
        self._worker.close()
        for pool in (self._pictures, self._forms, self._downloads):
            pool.shutdown(wait=False)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def submit(
        self,
        prepared: Prepared,
        deliver: Callable[[Delivery], None],
        may_wait: bool = False,
        observer: Observer | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Give a prepared prompt to the worker.

        Args:
            deliver: takes its tokens, in the worker's thread.
            may_wait: whether it is taken although the queue is full.
            observer: learns of the prompt.
            adapter: see `stream`.

        Raises:
            ArgumentError: there is no such adapter.
            BusyError: the queue is full, or the engine closed.
            Llama4Error: it is the engine of a process that this one was forked from.
            ContextLengthError: the prompt leaves no room for a reply in the window, or in the engine's memory.
        """
        self._check_room(may_wait)
        length = int(prepared.inputs.attention_mask.sum())
        request = Request(
            prepared.inputs,
            self.llm.model,
            prepared.sampler,
            max_new_tokens=self.scheduler.reply_budget(length, prepared.max_new_tokens),
            stop_ids=prepared.stop_ids,
            deliver=deliver,
            alternatives=prepared.top_logprobs,
            matcher=prepared.matcher(self.llm.tokenizer, self.llm.config.text.vocab_size),
            observer=observer,
            adapter=self._adapters.of(self._usual_adapter if adapter is None else adapter),
        )
        self.scheduler.check(request)
        self._worker.put(lambda: self.scheduler.add(request))
        return request

    def check_process(self) -> None:
        """Raises:
        Llama4Error: this process was forked from that of the engine.
        """
        if os.getpid() != self._process:
            raise Llama4Error(
                "this process was forked from the engine's, whose thread is not here; make an Engine in each process"
            )

    def _check_room(self, may_wait: bool = False) -> None:
        self.check_process()
        if not may_wait and self.max_waiting is not None and self.num_waiting >= self.max_waiting:
            raise BusyError(f"{self.max_waiting} requests wait already; ask again later")

    async def compute(self, work: Callable[[Llama4], T], adapter: str | None = None) -> T:
        """Something that no request of the scheduler computes, between two tokens of those that run: they wait.

        Raises:
            ArgumentError: there is no such adapter.
            BusyError: the queue is full, or the engine closed.
            Llama4Error: it is the engine of a process that this one was forked from.
        """
        self._check_room()
        result: Future[T] = Future()

        def run() -> bool:
            if not result.set_running_or_notify_cancel():
                return False
            try:
                result.set_result(self._with_adapter(work, adapter))
            except BaseException as error:
                result.set_exception(error)
            return True

        self._worker.put(run)
        return await asyncio.wrap_future(result)

    def _with_adapter(self, work: Callable[[Llama4], T], adapter: str | None) -> T:
        usual = self._usual_adapter
        if adapter in (None, usual):
            return work(self.llm)
        self.llm.set_adapter(adapter)
        try:
            return work(self.llm)
        finally:
            self.llm.set_adapter(usual)

    def cancel(self, request: Request) -> None:
        """Stop a request, from any thread; its memory is free after the worker's next token at the latest."""
        if not self._worker.is_closed:  # no lock: a stream is let go of in any thread, at any time
            self._worker.commands.put(lambda: self.scheduler.cancel(request))


class EngineStream:
    """A reply as it comes, to iterate over with `for` or `async for`: pieces of text, never empty or with half a
    character. `events` and `async_events` have tool calls, too. Iteration may stop at any point.

    Threads, and tasks of one loop or several, that iterate over one stream share its pieces: each goes to one of them.
    Of an error one of them learns; for the others the stream ends. (One iterator, of `iter(stream)`, is of one thread:
    Python's generators raise ValueError where two ask at once.)
    """

    def __init__(
        self,
        engine: Engine,
        preparation: Preparation,
        seed: int | None,
        adapter: str | None = None,
        observer: Observer | None = None,
        *,
        parallel_tool_calls: bool = True,
    ) -> None:
        self._engine, self._seed, self._adapter, self._observer = engine, seed, adapter, observer
        self._preparation: Preparation | None = preparation  # until it is open: pictures take memory
        self._parallel_tool_calls = parallel_tool_calls
        self._mailbox = Mailbox()
        self._deltas: deque[Delta] = deque()
        self._reader: tuple[ReplyText, ReplyBuilder] | None = None
        self._request: Request | None = None
        self._cancel: Callable[[], object] | None = None
        self._opening, self._reading = threading.Lock(), threading.Lock()

    def open(self, may_wait: bool = False) -> None:
        """Prepare the prompt and ask the engine; iteration does so by itself.

        Args:
            may_wait: whether the engine takes it although its queue is full.

        Raises:
            Llama4Error: as `Llama4.chat`, `BusyError` among others.
        """
        with self._opening:
            if self._cancel is None:
                self._open(may_wait)

    def _open(self, may_wait: bool) -> None:
        assert self._preparation is not None
        prepared = self._preparation.with_seed(self._seed)
        builder = prepared.builder(self._engine.llm.tokenizer, one_call=not self._parallel_tool_calls)
        request = self._engine.submit(prepared, self._mailbox.put, may_wait, self._observer, self._adapter)
        self._request = request
        text = TextAssembler(prepared.stop)
        silent = self._engine.silent_ids
        self._reader = ReplyText(0, request.max_new_tokens, text, request.stop_ids, silent), builder
        self._cancel = weakref.finalize(self, self._engine.cancel, request)
        self._preparation = None
        if self._mailbox.is_closed:  # cancelled by another thread meanwhile
            self._cancel()

    async def async_open(self) -> None:
        """`open` for asyncio."""
        if (preparation := self._preparation) is not None:
            await self._engine.in_thread(preparation.messages, self.open, preparation.has_form)

    def with_seed(self, seed: int | None) -> EngineStream:
        """Another reply to the same prompt, which is prepared once for both. Before this one is open. What observes
        the prompt does so once, for this one."""
        assert self._preparation is not None
        parallel = self._parallel_tool_calls
        return EngineStream(self._engine, self._preparation, seed, self._adapter, parallel_tool_calls=parallel)

    def cancel(self) -> None:
        """Stop the model's work on it. What has come stays in `reply`."""
        self._mailbox.close()
        if self._cancel is not None:
            self._cancel()

    @property
    def was_taken(self) -> bool:
        return self._request is not None and self._reader is not None

    @property
    def request(self) -> Request:
        """What the engine computes."""
        assert self._request is not None, "open comes first"
        return self._request

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Tokens -> bytes, perhaps parts of characters."""
        return self._engine.llm.tokenizer.decode_bytes(ids)

    @property
    def reply(self) -> Reply:
        """What has come so far; once iteration has ended, the whole reply.

        Raises:
            Llama4Error: nothing was asked yet.
        """
        if self._reader is None:
            raise Llama4Error("the stream was not begun; iterate over it first")
        return self._reader[1].reply()

    @property
    def tokens(self) -> Sequence[Token]:
        """Those that the piece which came last, and those before it, are made of."""
        return self._reader[1].tokens if self._reader is not None else ()

    @property
    def stop_string(self) -> str | None:
        """The string that ended the reply; None if another thing did."""
        return self._reader[0].text.stop_string if self._reader is not None else None

    def __iter__(self) -> Iterator[str]:
        for delta in self.events():
            if isinstance(delta, TextDelta):
                yield delta.text

    async def __aiter__(self) -> AsyncIterator[str]:
        async for delta in self.async_events():
            if isinstance(delta, TextDelta):
                yield delta.text

    def events(self) -> Iterator[Delta]:
        """The rest of the reply: pieces of text, and tool calls as they come."""
        self.open()
        while (delta := self._next()) is not None:
            yield delta

    async def async_events(self) -> AsyncIterator[Delta]:
        """`events` for asyncio."""
        await self.async_open()
        while (delta := await self._next_async()) is not None:
            yield delta

    def _next(self) -> Delta | None:
        while (delta := self._poll()) is None and not self._mailbox.is_closed:
            self._engine.check_process()
            self._mailbox.wait()
        return delta or self._poll()

    async def _next_async(self) -> Delta | None:
        while (delta := self._poll()) is None and not self._mailbox.is_closed:
            self._engine.check_process()
            await self._mailbox.wait_async()
        return delta or self._poll()

    def _poll(self) -> Delta | None:
        """What follows, if it has come. One reader at a time makes text of tokens."""
        with self._reading:
            while not self._deltas and not self._mailbox.is_closed and (item := self._mailbox.take()) is not None:
                self._take(item)
            return self._deltas.popleft() if self._deltas else None

    def _take(self, delivery: Delivery) -> None:
        if isinstance(delivery, Exception):
            self.cancel()
            raise delivery
        assert self._reader is not None
        text, builder = self._reader
        event = text.push(delivery)
        self._deltas.extend(builder.add(event))
        if event.finish_reason is not None or builder.is_complete:
            self.cancel()  # the engine knows no stop strings, and no calls
