"""llama.cpp through its own programs: `llama-bench` and `llama-batched-bench` in the place of a worker.

Every sample is a process that maps the file, warms up, and runs one task. The model is written as GGUF before, in the
type that is nearest to the weights that this library computes with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llama4.bench.engine import EngineConfig
from llama4.bench.process_memory import peak_bytes_of
from llama4.bench.tasks import Task
from llama4.errors import Llama4Error
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.convert import convert_to_gguf

NAME = "llama.cpp"
TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "q8_0", "int4": "q4_0"}
"""What this library computes with -> the type of GGUF that stands beside it."""
TIMEOUT = 1800.0
"""Seconds after which a program is ended."""


POLL = 0.1
"""Seconds between looks at a program's memory."""


def directory_of(text: str, program: str) -> str | None:
    """DIRECTORY of `llama.cpp=DIRECTORY`; None if it is something else.

    Raises:
        argparse.ArgumentTypeError: the program is not there.
    """
    name, _, directory = text.partition("=")
    if name != NAME or not directory:
        return None
    if not (Path(directory) / program).is_file():
        raise argparse.ArgumentTypeError(
            f"there is no {program} in {directory}; build llama.cpp and name the directory with its "
            "programs, such as build/bin"
        )
    return directory


def prepare(directory: Path, compute: str, scheme: str | None, scratch: Path) -> tuple[str, Path] | None:
    """A model's weights in words, and the file that holds them: its own, or one that is written to `scratch`; None if
    there is no type for them.

    Raises:
        Llama4Error: a model that GGUF has no form for.
    """
    if scheme is None and directory.suffix == ".gguf" and open_checkpoint(directory)[1].plan:
        return "the same file", directory
    if (type_ := TYPES.get(scheme or compute)) is None:
        return None
    if not (path := scratch / f"{type_}.gguf").exists():
        convert_to_gguf(directory, path, type_)
    return type_.upper(), path


@dataclass(frozen=True, slots=True)
class Output:
    """What a program wrote, and the most memory that it had."""

    stdout: str
    stderr: str
    peak_bytes: int


def run_program(path: Path, *arguments: str, timeout: float = TIMEOUT) -> Output:
    """Raises:
    Llama4Error: it cannot be run, fails, or is not done within so many seconds.
    """
    try:
        process = subprocess.Popen(
            [path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise Llama4Error(f"{path} cannot be run: {error}") from None
    with process:
        try:
            output = _output(process, time.monotonic() + timeout)
        except TimeoutError:
            process.kill()
            raise Llama4Error(f"{path.name} was not done within {timeout:.0f} seconds") from None
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = output.stderr.strip().splitlines()
        raise Llama4Error(
            f"{path.name} failed with code {process.returncode}: {said[-1] if said else 'it said nothing'}"
        )
    return output


def _output(process: subprocess.Popen[str], end: float) -> Output:
    """Of a process when it is done; its memory is looked at meanwhile.

    Raises:
        TimeoutError: it is not done at that time.
    """
    peak = 0
    while time.monotonic() <= end:
        peak = max(peak, peak_bytes_of(process.pid))
        with suppress(subprocess.TimeoutExpired):
            return Output(*process.communicate(timeout=POLL), max(peak, peak_bytes_of(process.pid)))
    raise TimeoutError


class Programs:
    """What `Worker` with a `TimedEngine` is for engines in Python.

    Args:
        config: of which `directory` is a file in GGUF, and `programs` the directory of the programs.
    """

    pid = 0
    """No process stays."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.programs is not None
        self._directory, self._config = Path(config.programs), config
        self._peak = 0

    def can(self, task: Task) -> bool:
        """Pictures are not in these programs; several rows are in a program that may not have been built."""
        if task.kind == "picture":
            return False
        return task.rows == 1 or (self._directory / "llama-batched-bench").is_file()

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "seconds":
            return self._seconds(*arguments)
        assert method == "peak_bytes", method
        return self._peak

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
        model = ["-m", self._config.directory, "-t", str(self._config.threads)]
        output = run_program(self._directory / program, *model, *arguments)
        self._peak = max(self._peak, output.peak_bytes)
        lines = [line for line in output.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise Llama4Error(f"{program} printed no JSON; build a newer llama.cpp")
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def close(self) -> None: ...

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
