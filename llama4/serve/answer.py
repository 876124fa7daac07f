"""The replies to one request, as the engine gives them, whatever the form in which they are told."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from llama4.engine.replies import Delta
from llama4.serve.engine import EngineStream
from llama4.serve.errors import Names, RequestError

T = TypeVar("T")


class Answer(ABC):
    """One or several replies to a request.

    Attributes:
        streams: that of each reply.
        num_tokens: of each reply, up to the delta that `deltas` gave last.
        last_event: what ends a stream of events, also after an error.
    """

    last_event = ""

    def __init__(self, streams: Sequence[EngineStream], names: Names) -> None:
        self.streams, self._names = list(streams), names
        self.num_tokens = [0] * len(self.streams)

    def names(self, index: int) -> Names:
        """How the request's fields are called that a reply's errors are about."""
        return self._names

    async def open(self) -> None:
        """Prepare all prompts; what is wrong with them is raised here, before anything is sent.

        Raises:
            RequestError: they cannot be answered.
        """
        for i, stream in enumerate(self.streams):
            with self.names(i).told():
                await stream.async_open()

    async def finish(self) -> None:
        """Wait for all of it; as `open`, raises RequestError."""
        await read_all(self._sources())

    def cancel(self) -> None:
        """Stop the engine's work on it."""
        for stream in self.streams:
            stream.cancel()

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta | None], None]:
        """The pieces of all replies as they come, each with the number of its reply; None where that has ended."""
        async with aclosing(_merged(self._sources())) as merged:
            async for i, item in merged:
                delta, self.num_tokens[i] = item or (None, len(self.streams[i].tokens))
                yield i, delta

    def _sources(self) -> list[AsyncIterator[tuple[Delta, int]]]:
        return [self._source(i) for i in range(len(self.streams))]

    async def _source(self, index: int) -> AsyncIterator[tuple[Delta, int]]:
        """A reply's deltas, each with the tokens up to it: more may have come before `deltas` gives it."""
        stream = self.streams[index]
        async for delta in named(stream.async_events(), self.names(index)):
            yield delta, len(stream.tokens)

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """What is answered in one piece, once it is finished."""

    @abstractmethod
    def events(self) -> AsyncIterator[str]:
        """What is answered in pieces, as they go over the wire."""

    @abstractmethod
    def failure(self, error: RequestError) -> str:
        """The event of an error after the first piece."""


def as_event(content: Mapping[str, Any] | str, name: str | None = None) -> str:
    """One event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name is not None else f"data: {text}\n\n"


async def named(deltas: AsyncIterator[Delta], names: Names) -> AsyncIterator[Delta]:
    """The same; errors have the names of the request."""
    with names.told():
        async for delta in deltas:
            yield delta


async def read_all(sources: Iterable[AsyncIterator[object]]) -> None:
    """Wait for all of some replies; where one fails, no other is waited for."""

    async def read(source: AsyncIterator[object]) -> None:
        async for _ in source:
            pass

    try:
        async with asyncio.TaskGroup() as group:
            for source in sources:
                group.create_task(read(source))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _merged(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T | None], None]:
    """What several iterators give, as it comes, with the number of each; None where one has ended."""
    arrived: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue(maxsize=64)

    async def pump(index: int, source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                await arrived.put((index, item))
            await arrived.put((index, None))
        except Exception as error:
            await arrived.put((index, error))

    tasks = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            left -= item is None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
