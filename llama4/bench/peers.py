"""Engines that this interpreter does not run, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from llama4.bench import llama_cpp, vllm
from llama4.bench.engine import EngineConfig
from llama4.bench.tasks import Task


class Peer(Protocol):
    """What stands in the place of a worker."""

    @property
    def pid(self) -> int:
        """0 where no process stays."""

    def can(self, task: Task) -> bool: ...

    def call(self, method: str, *arguments: Any) -> Any:
        """ "seconds" of a task, warm, or "peak_bytes"."""

    def __enter__(self) -> Peer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PeerKind(NamedTuple):
    """How one is named, prepared and started.

    Attributes:
        usage: what is written behind --vs.
        programs: what is written there -> where its programs are, None if it is another's.
        version: of these programs -> name and version.
        prepare: a model, the dtype computed with, a scheme or None, and a directory for what it needs -> the words for
            its weights, and the file or directory that it runs; None if it has nothing like that.
        start: the peer, with a model that is so prepared, and the number below which random tokens are.
    """

    usage: str
    programs: Callable[[str], str | None]
    version: Callable[[str], str]
    prepare: Callable[[Path, str, str | None, Path], tuple[str, Path] | None]
    start: Callable[[EngineConfig, int], Peer]


PEERS = {
    llama_cpp.NAME: PeerKind(
        "llama.cpp=DIRECTORY with its llama-bench",
        lambda text: llama_cpp.directory_of(text, "llama-bench"),
        lambda programs: llama_cpp.NAME,
        llama_cpp.prepare,
        lambda config, vocabulary: llama_cpp.Programs(config),
    ),
    vllm.NAME: PeerKind(
        "vllm=PYTHON of an environment that has it", vllm.interpreter_of, vllm.version, vllm.prepare, vllm.Interpreter
    ),
}
