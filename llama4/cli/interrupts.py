"""Ctrl-C and SIGTERM end a command within a second, whatever it is at."""

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

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Signals that end a command, by what it says of them; its exit code is `exit_code`."""
PATIENCE = 0.7
"""Seconds that a command has to end by itself."""


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: nobody but the command itself catches it."""


def raise_terminated(number: int, frame: object) -> NoReturn:
    raise Terminated


@runtime_checkable
class Gentle(Protocol):
    """A handler of these signals that lets what is at work come to an end; a second one does not wait for that."""

    def request(self) -> None: ...


@contextmanager
def answered_soon() -> Iterator[None]:
    """Python answers signals between two of its own instructions, and a kernel, a download or an import may keep it
    from that. If the block has not ended some time after it, the process does: what it was writing has no name yet, and
    the next run deletes it, or continues from there. A handler that can stop the block by itself is asked first, once.
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
            number = received[0]
            if number not in ENDINGS:
                continue
            handler = signal.getsignal(number)
            if isinstance(handler, Gentle) and handler is not asked:
                asked = handler
                handler.request()
            elif not ended.wait(PATIENCE):
                os._exit(say_ended(number))


def exit_code(number: int) -> int:
    """That of a shell's commands that end by a signal."""
    return 128 + number


def say_ended(number: int) -> int:
    """In a line of its own: a terminal may stand in the middle of one; -> the exit code."""
    line = f"llama4: {ENDINGS[signal.Signals(number)]}"
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
    return exit_code(number)


def leave(code: int) -> NoReturn:
    """End the process now, without waiting for threads that download or compute. Python would take torch apart first,
    which takes half a second, and seconds on a busy machine."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    if code not in map(exit_code, ENDINGS):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
