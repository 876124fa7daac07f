"""A server in a process of its own, and what it has open."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llama4.bench.serving.client import Target
from llama4.errors import Llama4Error

STOP_SECONDS = 40


@dataclass(frozen=True)
class Held:
    """What a process holds; None where the system does not tell.

    Attributes:
        memory: resident bytes.
        files: that are open, connections included.
        threads: of it.
    """

    memory: int | None
    files: int | None
    threads: int | None

    @classmethod
    def of(cls, pid: int) -> Held:
        process = Path(f"/proc/{pid}")
        try:
            status = (process / "status").read_text(encoding="utf-8", errors="replace")
            found = {name: int(value) for name, value in re.findall(r"(?m)^(VmRSS|Threads):\s+(\d+)", status)}
            return cls(found["VmRSS"] * 1024, len(os.listdir(process / "fd")), found["Threads"])
        except (OSError, KeyError):
            return cls(None, None, None)


class Served:
    """`llama4 serve MODEL` at a free port, until the end of a `with`.

    Raises:
        Llama4Error: it does not start.
    """

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "llama4", "serve", model, "--port", "0", "--served-model-name", "model"]
        self._process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        url = None
        for line in self._process.stdout:
            if url := re.search(r"http://[\d.]+:\d+", line):
                break
        if url is None:
            raise Llama4Error(f"llama4 serve {model} did not start; what it says stands above")
        self.target = Target(url[0], "model")

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


async def rest(target: Target, seconds: float = 30.0) -> dict[str, Any]:
    """Wait until the server computes nothing, and connections that were closed are gone; -> what it still has to do."""
    left: dict[str, Any] = {}
    for _ in range(int(seconds * 10)):
        text = await target.get("/metrics")
        left = {
            name: float(value)
            for name, value in re.findall(r"(?m)^vllm:(num_requests_(?:running|waiting))\{.*\} (\S+)$", text)
        }
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    return left


def allow_many_files(wanted: int) -> None:
    """Each connection is one.

    Raises:
        Llama4Error: the system does not allow so many.
    """
    with suppress(ImportError):
        import resource  # not on Windows

        soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most != resource.RLIM_INFINITY and most < wanted:
            raise Llama4Error(f"{wanted} open files are needed, the system allows {most}; see ulimit -Hn")
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
