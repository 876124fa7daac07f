"""The replies to one request, as the engine gives them, whatever the form in which they are told."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from llama4.engine.replies import Delta
from llama4.serve.engine import EngineStream
from llama4.serve.errors import RequestError


class Answer(ABC):
    """One or several replies to a request.

    Attributes:
        streams: that of each reply.
        last_event: what ends a stream of events, also after an error.
    """

    last_event = ""

    def __init__(self, streams: Sequence[EngineStream]) -> None:
        self.streams = list(streams)

    async def open(self) -> None:
        """Prepare all prompts; what is wrong with them is raised here, before anything is sent."""
        await asyncio.gather(*(asyncio.to_thread(stream.open) for stream in self.streams))

    async def finish(self) -> None:
        """Wait for all of it."""
        await asyncio.gather(*map(read, self.streams))

    def cancel(self) -> None:
        """Stop the engine's work on it."""
        for stream in self.streams:
            stream.cancel()

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """The pieces of all replies as they come, each with the number of its reply."""
        async with aclosing(_merged([stream.async_events() for stream in self.streams])) as merged:
            async for each in merged:
                yield each

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


async def read(stream: EngineStream) -> None:
    """Wait for all of it."""
    async for _ in stream.async_events():
        pass


async def _merged(sources: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """What several iterators give, as it comes, with the number of each."""
    arrived: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(maxsize=64)

    async def pump(index: int, source: AsyncIterator[Delta]) -> None:
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
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
