"""A process of its own for each that is measured: what one loads, keeps or spoils is no matter to the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any


class Worker:
    """A fresh process that makes a thing and calls its methods when told to; it ends with this one."""

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with _deaf():
            self._process.start()
        theirs.close()
        self._answer()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *arguments: object) -> Any:
        """What the thing's method gives.

        Raises:
            ValueError: what it raised, or that the process has died.
        """
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, result = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ValueError(
                f"a measuring process ended with code {self._process.exitcode}; if that is -9, it wanted more memory "
                "than there is"
            ) from None
        if error is not None:
            raise error
        return result

    def close(self, patience: float = 10.0) -> None:
        """Let it end by itself; after so many seconds it has to."""
        self._pipe.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(patience=10.0 if error is None else 0.0)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started here do not hear Ctrl-C, which is for the one that started them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.dup2(2, 1)  # stdout is for the report
    made: list[object] = []
    method, told = "", arguments
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the one that started this process is gone
        while True:
            pipe.send(_outcome(made, make, method, told))
            method, told = pipe.recv()


def _outcome(
    made: list[object], make: Callable[..., object], method: str, told: tuple[object, ...]
) -> tuple[ValueError | None, object]:
    """An error or None, and what a call gave; the first call makes the thing."""
    try:
        if made:
            return None, getattr(made[0], method)(*told)
        made.append(make(*told))
        return None, None
    except (ValueError, OSError) as error:
        return ValueError(str(error)), None
    except Exception as error:
        traceback.print_exc()
        return ValueError(f"measuring failed: {type(error).__name__}: {error}"), None
