"""Running a server: where it listens, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import h11
import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama4.errors import ArgumentError, Llama4Error
from llama4.serve.app import Server
from llama4.serve.starting import starting
from llama4.units import bytes_text

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 30
MAX_HEADERS = 64 * 2**10
HEAD_SECONDS = 60.0
"""In which the head of a request must have come."""
ANSWERED_SECONDS = 0.3
"""After which what had its answer already is over."""
MAX_FILES = 2**16


@dataclass(frozen=True)
class Address:
    """Where a server listens; with both files, by TLS."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None


@contextmanager
def listening_at(address: Address) -> Iterator[socket.socket]:
    """The socket of an address; within this, who asks there learns that the model is being loaded.

    Raises:
        ArgumentError: the address cannot be had.
        Llama4Error: the certificate or its key cannot be read.
    """
    tls = _certificate(address)
    listening = _listen(address)
    with starting(listening, tls):
        yield listening


def run(server: Server, address: Address, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; what is being answered then has 30 seconds to end. A second one ends the process
    at once."""
    _allow_many_connections()
    runner = _Runner(server, address)

    def end(number: int, frame: object) -> None:
        """Before uvicorn listens to signals, and after it has stopped, when it passes on what it got."""
        runner.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    _say(server, address, listening.getsockname()[1])
    try:
        runner.run(sockets=[listening])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)  # the engine may be at a long prompt
        server.engine.close()
        server.service.store.close()
    print(f"llama4 no longer serves {server.settings.name}", file=sys.stderr, flush=True)


class _Runner(uvicorn.Server):
    def __init__(self, server: Server, address: Address) -> None:
        super().__init__(http_config(server, address))
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What comes by a connection that is still open is refused."""
        if self._server.service.is_draining:
            _leave(sig, frame)
        self._server.service.is_draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so, if it takes longer than what has been answered already. What is answered in the background has as
        long as what clients wait for."""
        loop, running = asyncio.get_running_loop(), self._server.service.running
        end = loop.time() + DRAIN_SECONDS
        telling = loop.call_later(ANSWERED_SECONDS, self._tell)
        try:
            await super().shutdown(sockets)
            if running:
                await asyncio.wait(running, timeout=max(end - loop.time(), 0))
        finally:
            telling.cancel()

    def _tell(self) -> None:
        if self.server_state.tasks or self._server.service.running:
            told = f"stopping; what is being answered has {DRAIN_SECONDS} seconds; Ctrl-C again stops now"
            print(f"llama4: {told}", file=sys.stderr, flush=True)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End the process now, with the code that a shell has for a signal."""
    os._exit(128 + number)


class _Connection(H11Protocol):
    """One that does not say what it wants is closed: each is an open file, of which there are so many."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _watch(self) -> None:
        """Wait no longer than `HEAD_SECONDS` for the rest of a head; for its first byte, after an answer, uvicorn does
        not wait that long."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def http_config(server: Server, address: Address) -> uvicorn.Config:
    """How connections are served. The parser is h11, whatever is installed: others set no limit to headers. What
    clients send that is no HTTP is not logged: it would fill the log."""
    return uvicorn.Config(
        server.app,
        http=_Connection,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )


def _allow_many_connections() -> None:
    """Each is an open file, of which a shell allows 1,024 where the system would allow more."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, MAX_FILES), most))


def _listen(address: Address) -> socket.socket:
    if not 0 <= address.port <= 65535:
        raise ArgumentError(f"--port is {address.port}; it must be from 0 (any that is free) to 65535")
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=2048)
    except OSError as error:
        raise ArgumentError(
            f"cannot listen at {address.host}:{address.port}: {error.strerror or error}; "
            "choose another --port or --host"
        ) from error


def _certificate(address: Address) -> ssl.SSLContext | None:
    """As uvicorn will read it."""
    if address.certificate is None:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        tls.load_cert_chain(address.certificate, address.key)
        return tls
    except OSError as error:
        raise Llama4Error(
            f"{address.certificate} and {address.key} are no certificate and its key ({error.strerror or error}); "
            "give both in PEM"
        ) from error


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(server: Server, address: Address, port: int) -> None:
    """What one needs to know at the start."""
    engine, name, key = server.engine, server.settings.name, server.settings.api_key
    scheme = "https" if address.certificate else "http"
    host = f"[{address.host}]" if ":" in address.host else address.host
    url, limit = f"{scheme}://{host}:{port}", engine.scheduler.pool.limit
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What can you do?"}]})
    secret = ' -H "Authorization: Bearer $LLAMA4_API_KEY"' if key else ""
    print(f"llama4 serves {name} at {url}/v1")
    print(
        f"  {engine.scheduler.max_batch} conversations at once, {engine.scheduler.window:,} tokens each at most, "
        f"keys and values in {bytes_text(limit) if limit else 'as much memory as they take'}"
    )
    if adapters := ", ".join(engine.llm.adapters):
        print(f"  with adapters, by their names as the model: {adapters}")
    if engine.llm.model.dtype != torch.float32:
        print(
            "  in company sums may be rounded differently: where two tokens are about equally likely, a reply may go "
            "on otherwise than alone"
        )
    if server.settings.has_page:
        print(f"  in a browser: {url}/")
    print(f"  try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{secret} -d {shlex.quote(body)}")
    sys.stdout.flush()
    if not is_loopback(address.host) and key is None:
        logger.warning("anybody who reaches %s may ask: give --api-key, or listen at 127.0.0.1", url)
