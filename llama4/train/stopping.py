"""Ctrl-C and SIGTERM during a run: the step that is being taken ends first, and its state is saved."""

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
    """A handler of SIGINT and SIGTERM. A second one ends the run at once, as it would without it.

    Attributes:
        event: set once the run shall stop.
        number: the signal that came first.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.number: int | None = None
        self.before: dict[int, Any] = {}
        self._lock = threading.RLock()  # a second signal may come within the first

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """It stays the handler after the first Ctrl-C: a thread that sees the same one later must find it."""
        self.request()
        if self.number is not None:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.number = number

    def request(self) -> None:
        """Any thread may ask, also where the main thread is in a kernel and cannot answer yet."""
        with self._lock:
            is_first = not self.event.is_set()
            self.event.set()
        if is_first:
            logger.warning(
                "stopping after this step, whose state is saved; a second signal stops now, and loses the step"
            )


@contextmanager
def stoppable() -> Iterator[Stopper]:
    """What these signals stop. Only a process's main thread gets them. Where SIGTERM would have ended the process, it
    does so after this, unless the block raised an error, which is told instead."""
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    for each in (signal.SIGINT, signal.SIGTERM):
        stopper.before[each] = signal.signal(each, stopper)
    try:
        yield stopper
    finally:
        for number, before in stopper.before.items():
            signal.signal(number, before)
    if stopper.number == signal.SIGTERM and stopper.before[signal.SIGTERM] == signal.SIG_DFL:
        signal.raise_signal(signal.SIGTERM)
