"""Fresh processes to measure in, so that what one loads or leaves in memory does not affect the others."""

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

from llama4.errors import Llama4Error


class Worker:
    """A process that constructs an object and calls its methods on request. It ends with this process.

    Raises:
        Llama4Error: the constructor failed, or the process died.
        TimeoutError: no reply within `timeout` seconds.
    """

    def __init__(self, make: Callable[..., object], *arguments: object, timeout: float | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._timeout = timeout
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with _without_interrupts():
            self._process.start()
        theirs.close()
        try:
            self._reply()
        except BaseException:
            self.close(patience=0)
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *arguments: object) -> Any:
        """The result of the object's method.

        Raises:
            Llama4Error: the method failed, or the process died.
            TimeoutError: no reply within the worker's timeout.
        """
        self._pipe.send((method, arguments))
        return self._reply()

    def _reply(self) -> Any:
        if self._timeout is not None and not self._pipe.poll(self._timeout):
            raise TimeoutError(f"no reply within {self._timeout} seconds")
        try:
            error, result = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Llama4Error(
                f"a measuring process ended with code {self._process.exitcode}; -9 usually means that it needed more "
                "memory than there is"
            ) from None
        if error is not None:
            raise error
        return result

    def close(self, patience: float = 10.0) -> None:
        """End the process: wait `patience` seconds, then terminate it."""
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
def _without_interrupts() -> Iterator[None]:
    """Processes started within ignore Ctrl-C, which is for their parent."""
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
    method, given = "", arguments
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while True:
            pipe.send(_outcome(made, make, method, given))
            method, given = pipe.recv()


def _outcome(
    made: list[object], make: Callable[..., object], method: str, given: tuple[object, ...]
) -> tuple[ValueError | None, object]:
    """An error or None, and a call's result; the first call constructs the object."""
    try:
        if made:
            return None, getattr(made[0], method)(*given)
        made.append(make(*given))
        return None, None
    except (ValueError, OSError) as error:
        return Llama4Error(str(error)), None
    except Exception as error:
        traceback.print_exc()
        return Llama4Error(f"measuring failed: {type(error).__name__}: {error}"), None
