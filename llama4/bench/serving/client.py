"""A small HTTP client for load: what it costs is taken from the server that is measured, so it does nothing else."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llama4.errors import ArgumentError, Llama4Error

READ_AHEAD = 2**16
"""Bytes that are read before somebody asks for them."""


@dataclass
class TimedReply:
    """What a server replied, and when.

    Attributes:
        text: of the reply.
        tokens: of the reply, as the server counts them.
        prompt_tokens: the same of the prompt.
        begun, first, last: seconds, by `time.perf_counter`: of the request, its first and its last token.
        events: with text in them.
    """

    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    begun: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    events: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """One event of a stream of /v1/chat/completions."""
        if "error" in event:
            raise Llama4Error(f"the server answered with an error: {event['error']!r:.300}")
        for choice in event.get("choices") or ():
            if text := (choice.get("delta") or {}).get("content"):
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.text += text
                self.events += 1
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        usage = event.get("usage") or {}
        self.tokens = usage.get("completion_tokens", self.tokens)
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)


@dataclass(frozen=True)
class Target:
    """A server in OpenAI's form.

    Attributes:
        url: "http://127.0.0.1:8000", or with what stands before /chat/completions behind it.
        model: the name that it knows.
        key: that it asks for.
        leaves_out: fields that it refuses, and is not sent.
    """

    url: str
    model: str
    key: str | None = None
    leaves_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ArgumentError(f"{self.url!r} is no address; write http://HOST:PORT")

    async def connect(self, read_ahead: int = READ_AHEAD) -> Connection:
        parts = urlsplit(self.url)
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if secure else 80)
        assert parts.hostname is not None
        streams = await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=read_ahead)
        return Connection(self, parts.netloc, *streams)

    def path(self, route: str) -> str:
        """Of a route such as /v1/models or /metrics."""
        base = urlsplit(self.url).path.rstrip("/")
        return route if not base else base.removesuffix("/v1") + route

    async def chat(self, body: Mapping[str, Any]) -> TimedReply:
        """Stream a reply to its end.

        Raises:
            Llama4Error: the server refuses, or breaks off.
        """
        async with self._connected() as connection:
            await connection.send(self.chat_request(body))
            return await connection.read_chat()

    def chat_request(self, body: Mapping[str, Any]) -> bytes:
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        taken = {name: value for name, value in body.items() if name not in self.leaves_out}
        return self.request("POST", "/v1/chat/completions", {"model": self.model, **taken, **usage})

    def request(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of a request, after which the server closes the connection."""
        content = json.dumps(body).encode() if body is not None else b""
        head = [f"{method} {self.path(route)} HTTP/1.1", f"host: {urlsplit(self.url).netloc}", "connection: close"]
        head += [f"authorization: Bearer {self.key}"] if self.key else []
        head += ["content-type: application/json", f"content-length: {len(content)}"] if content else []
        return "\r\n".join([*head, "", ""]).encode() + content

    async def get(self, route: str) -> str:
        """The text at a route.

        Raises:
            Llama4Error: there is none.
        """
        async with self._connected() as connection:
            await connection.send(self.request("GET", route))
            await connection.check_status()
            return b"".join([piece async for piece in connection.body()]).decode()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        """Raises:
        Llama4Error: what comes is cut short, or no HTTP.
        """
        connection = await self.connect()
        try:
            yield connection
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise Llama4Error(f"{self.url} broke off, or is no HTTP server: {error}") from None
        finally:
            connection.close()


class Connection:
    """One connection for one request."""

    def __init__(self, target: Target, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.target, self.reader, self.writer = target, reader, writer
        self._chunked = False

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read_chat(self, pause: float = 0.0) -> TimedReply:
        """A reply to its end; `pause` seconds are waited after each piece that is read."""
        answer = TimedReply()
        await self.check_status()
        async for event in self.events(pause):
            answer.take(event)
        if answer.finish_reason is None:
            raise Llama4Error("the server broke off within a reply")
        answer.tokens = answer.tokens or answer.events
        answer.last = answer.last or time.perf_counter()  # its tokens had no text
        answer.first = answer.first or answer.last
        return answer

    async def check_status(self) -> None:
        """Read the head of the answer.

        Raises:
            Llama4Error: it is not 200.
        """
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self._chunked = "transfer-encoding: chunked" in head.lower()
        if not re.match(r"HTTP/1\.[01] 200 ", head):
            told = b"".join([piece async for piece in self.body()])
            raise Llama4Error(f"{self.target.url} answered {head.splitlines()[0]}: {told[:300]!r}")

    async def body(self) -> AsyncIterator[bytes]:
        while self._chunked:
            size = int((await self.reader.readline()).split(b";")[0] or b"0", 16)
            piece = (await self.reader.readexactly(size + 2))[:-2]
            if not size:
                return
            yield piece
        while piece := await self.reader.read(READ_AHEAD):
            yield piece

    async def events(self, pause: float = 0.0) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream of events, up to [DONE]."""
        left = b""
        async for piece in self.body():
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield json.loads(data)
            if pause:
                await asyncio.sleep(pause)

    def close(self) -> None:
        self.writer.close()
