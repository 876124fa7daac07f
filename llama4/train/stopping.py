"""Ctrl-C during a run: the step that is being taken ends first, and its state is saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class Stopper:
    """A handler of SIGINT. A second Ctrl-C interrupts at once, as it would without it.

    Attributes:
        event: set once the run shall stop.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.before: Any = signal.SIG_DFL
        self._lock = threading.Lock()
        self._was_called = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """It stays the handler after the first Ctrl-C: a thread that sees the same one later must find it."""
        self.request()
        if self._was_called:
            signal.signal(signal.SIGINT, self.before)
            signal.raise_signal(signal.SIGINT)
        self._was_called = True

    def request(self) -> None:
        """Any thread may ask, also where the main thread is in a kernel and cannot answer yet."""
        with self._lock:
            is_first = not self.event.is_set()
            self.event.set()
        if is_first:
            logger.warning("stopping after this step, whose state is saved; Ctrl-C again stops now, and loses the step")


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets. Only a process's main thread gets Ctrl-C."""
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper.event
        return
    stopper.before = signal.signal(signal.SIGINT, stopper)
    try:
        yield stopper.event
    finally:
        signal.signal(signal.SIGINT, stopper.before)
