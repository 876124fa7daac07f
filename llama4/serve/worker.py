"""The thread of an engine."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from weakref import WeakSet

from llama4.engine.scheduler import Scheduler
from llama4.errors import ClosedError

logger = logging.getLogger(__name__)


class Worker:
    """Runs a scheduler, and does what it is told between two steps. It does not hold its engine, so that one that
    nobody holds is collected, and stops it.

    Attributes:
        commands: what it will do; it goes on to the next step where one says True.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.is_closed = False
        self._scheduler = scheduler
        self._closing = threading.Lock()
        self.thread = threading.Thread(target=self._work, name="llama4 engine", daemon=True)
        self.thread.start()
        _OPEN.add(self)

    def put(self, command: Callable[[], object]) -> None:
        """Raises:
        ClosedError: it was closed.
        """
        with self._closing:
            self.check_open()
            self.commands.put(command)

    def check_open(self) -> None:
        """Raises:
        ClosedError: it was closed.
        """
        if self.is_closed:
            raise ClosedError("the engine is closed; ask another one")

    def stop(self) -> None:
        """End after this step; takes no lock and waits for nobody, so a finalizer may call it in any thread."""
        self.is_closed = True
        self.commands.put(lambda: None)

    def close(self) -> None:
        """`stop`, and wait for the end."""
        with self._closing:
            self.stop()
        self.thread.join()

    def _work(self) -> None:
        while not self.is_closed:
            try:
                self._run_commands(wait=not self._scheduler.has_work)
                self._scheduler.step()
            except Exception as error:  # a bug: those who wait must not wait for ever
                logger.exception("a step of the engine failed")
                self._scheduler.fail_all(error)
        while not self.commands.empty():
            try:
                self._run_commands(wait=False)
            except Exception:
                logger.exception("a command of the engine failed")
        self._scheduler.fail_all(ClosedError("the engine was closed before the reply was complete"))

    def _run_commands(self, wait: bool) -> None:
        """Those that came, up to the first that has computed something: then those that run get a token."""
        with contextlib.suppress(queue.Empty):
            has_computed = self.commands.get(block=wait)()
            while has_computed is not True:
                has_computed = self.commands.get_nowait()()


_OPEN: WeakSet[Worker] = WeakSet()
"""Those whose threads may run."""


@atexit.register
def _close_all() -> None:
    """A thread that is still computing when the interpreter ends would end the process with an abort."""
    for worker in list(_OPEN):
        worker.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_OPEN.clear)  # a fork has none of the threads
