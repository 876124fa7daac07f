"""A server within a test."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import httpx
import pytest
import uvicorn

from llama4 import Engine, Llama4
from llama4.serve.app import Server, Settings
from llama4.serve.run import Address, http_config

QUESTION = [{"role": "user", "content": "What can you do?"}]
FOREVER = {"messages": QUESTION, "ignore_eos": True, "max_tokens": 10**5}


class Running:
    """A server in a thread of its own, and a client of it."""

    def __init__(self, llm: Llama4, settings: Settings, **engine: Any) -> None:
        self._limits = llm.processor.image_limits  # which a server sets
        self.engine = Engine(llm, **{"cache_memory": "8MiB", **engine})
        self.server = Server(self.engine, settings)
        self.listening = socket.create_server(("127.0.0.1", 0))
        config = http_config(self.server, Address())
        self._loop: asyncio.AbstractEventLoop | None = None

        async def app(scope: Any, receive: Any, send: Any) -> None:
            self._loop = asyncio.get_running_loop()
            await self.server.app(scope, receive, send)

        config.app = app
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: self._uvicorn.run(sockets=[self.listening]))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def num_tasks(self) -> int:
        """Of the server's loop, after its first request."""
        assert self._loop is not None
        return len(asyncio.all_tasks(self._loop))

    @property
    def connections(self) -> Any:
        return self._uvicorn.server_state.connections

    def close(self) -> None:
        self.client.close()
        self._uvicorn.should_exit = True
        self._thread.join()
        self.engine.close()
        self.engine.llm.processor.image_limits = self._limits

    def ask(self, **fields: Any) -> Any:
        answer = self.client.post("/v1/chat/completions", json=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """Until the event is set a reply has its first token and no other: none comes to its end before its client has
        done what a test is about, however busy the machine is."""
        decode, may_go_on = self.engine.scheduler._decode, threading.Event()
        monkeypatch.setattr(self.engine.scheduler, "_decode", lambda: decode() if may_go_on.wait(0.002) else 0)
        return may_go_on

    def is_idle(self) -> bool:
        return not self.engine.scheduler.has_work and self.engine.num_waiting == 0


def until(is_so: Any) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
