"""llama.cpp through its own benchmark programs, `llama-bench` and `llama-batched-bench`, in the place of a worker.

Every sample is a process that maps the file, warms up, and runs one task. The model is written as GGUF before, in the
type that is nearest to the weights that this library computes with.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from llama4.bench.engine import EngineConfig
from llama4.bench.tasks import Task
from llama4.errors import ArgumentError, Llama4Error

NAME = "llama.cpp"
TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "q8_0", "int4": "q4_0"}
"""What this library computes with -> the type of GGUF that stands beside it."""
TIMEOUT = 1800.0
"""Seconds after which a program is ended."""


def check_programs(directory: str) -> None:
    """Raises:
    ArgumentError: `llama-bench` is not there.
    """
    if not (Path(directory) / "llama-bench").is_file():
        raise ArgumentError(
            f"there is no llama-bench in {directory}; build llama.cpp and name the directory with its "
            "programs, such as build/bin"
        )


class Programs:
    """What `Worker` with a `TimedEngine` is for engines in Python.

    Args:
        config: of which `directory` is a file in GGUF, and `programs` the directory of the programs.
    """

    pid = 0
    """No process stays; those that ran are children of this one."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.programs is not None
        self._directory, self._config = Path(config.programs), config

    def can(self, task: Task) -> bool:
        """Pictures are not in these programs; several rows are in a program that may not have been built."""
        if task.kind == "picture":
            return False
        return task.rows == 1 or (self._directory / "llama-batched-bench").is_file()

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "seconds":
            return self._seconds(*arguments)
        assert method == "peak_bytes", method
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit

    def _seconds(self, task: Task) -> float:
        """Of a prompt, or of one step on average."""
        if task.rows > 1:
            sizes = ["-npp", str(task.prompt), "-ntg", str(task.new), "-npl", str(task.rows)]
            room = ["-c", str(task.rows * (task.prompt + task.new) + 256)]
            found = self._run("llama-batched-bench", *sizes, *room, "--output-format", "jsonl")
            return float(found["t_tg"]) / task.new
        tokens, steps = (task.prompt, 0) if task.kind == "prefill" else (0, task.new)
        before = ["-d", str(task.prompt)] if steps else []
        found = self._run("llama-bench", "-p", str(tokens), "-n", str(steps), *before, "-r", "1", "-o", "jsonl")
        return float(found["avg_ns"]) / 1e9 / max(steps, 1)

    def _run(self, program: str, *arguments: str) -> dict[str, Any]:
        """The last line of its output, which is JSON."""
        command = [str(self._directory / program), "-m", self._config.directory, "-t", str(self._config.threads)]
        try:
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except OSError as error:
            raise Llama4Error(f"{command[0]} cannot be run: {error}") from None
        except subprocess.TimeoutExpired:
            raise Llama4Error(f"{program} was not done within {TIMEOUT:.0f} seconds") from None
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            said = done.stderr.strip().splitlines()
            raise Llama4Error(
                f"{program} failed with code {done.returncode}: {said[-1] if said else 'it said nothing'}"
            )
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def close(self) -> None: ...

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
