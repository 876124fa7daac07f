"""Ctrl-C ends a command within a second, whatever it is at."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, Protocol, runtime_checkable

INTERRUPTED = 130
"""Exit code of a shell's commands that end by SIGINT."""
PATIENCE = 0.7
"""Seconds that a command has to end by itself."""


@runtime_checkable
class Gentle(Protocol):
    """A handler of Ctrl-C that lets what is at work come to an end; a second Ctrl-C does not wait for that."""

    def request(self) -> None: ...


@contextmanager
def answered_soon() -> Iterator[None]:
    """Python answers Ctrl-C between two of its own instructions, and a kernel, a download or an import may keep it from
    that. If the block has not ended some time after it, the process does: what it was writing has no name yet, and the
    next run deletes it, or continues from there. A handler that can stop the block by itself is asked first, once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ours, ended), name="llama4-interrupts", daemon=True).start()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        theirs.close()


def _watch(ours: socket.socket, ended: threading.Event) -> None:
    """Signals come as bytes, at once, whatever the main thread does."""
    asked = None
    with ours:
        while received := ours.recv(1):
            if received[0] != signal.SIGINT:
                continue
            handler = signal.getsignal(signal.SIGINT)
            if isinstance(handler, Gentle) and handler is not asked:
                asked = handler
                handler.request()
            elif not ended.wait(PATIENCE):
                say_interrupted()
                os._exit(INTERRUPTED)


def say_interrupted() -> None:
    """In a line of its own: a terminal may stand in the middle of one."""
    print("\nllama4: interrupted" if sys.stderr.isatty() else "llama4: interrupted", file=sys.stderr, flush=True)


def leave(code: int = INTERRUPTED) -> NoReturn:
    """End the process now, without waiting for threads that download or compute. Python would take torch apart first,
    which takes half a second, and seconds on a busy machine."""
    if code != INTERRUPTED:
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
