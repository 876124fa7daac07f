"""An action in a forked process: whatever it does, the process that tries it goes on, and knows what it cost."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama4.errors import Llama4Error

SECONDS, BYTES = 2.0, 300 << 20
"""What an error may cost, of the processor's time and of memory."""
PATIENCE, ROOM = 120.0, 2 << 30
"""Where a process is ended: seconds, and bytes more than it began with."""


@dataclass(frozen=True)
class Ended:
    """How an action ended.

    Attributes:
        error: the name of what it raised; "" if nothing.
        message: of it.
        expected: it did its work, or raised what users are told to expect.
        where: it was raised, in this library's files.
        seconds: of the processor's time.
        size: bytes of memory at its peak, above what there was before.
    """

    error: str
    message: str
    expected: bool
    where: str
    seconds: float
    size: int

    @property
    def problem(self) -> str | None:
        """What is wrong with it; None if nothing is."""
        if not self.expected:
            return f"{self.error}: {self.message[:150]} {self.where}"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.1f} s"
        return f"took {self.size >> 20} MiB" if self.size > BYTES else None


def call(action: Callable[[], object]) -> Ended:
    """Call a function in a forked process."""
    here, there = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            os.close(here)
            os.write(there, json.dumps(_outcome(action)).encode())
        finally:
            os._exit(0)
    os.close(there)
    begin, usual, killed = time.monotonic(), _resident(child), ""
    with os.fdopen(here, "rb") as pipe:
        while not select.select([pipe], [], [], 0.05)[0]:
            killed = "hangs" if time.monotonic() - begin > PATIENCE else ""
            killed = "eats memory" if _resident(child) - usual > ROOM else killed
            if killed:
                os.kill(child, signal.SIGKILL)
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    if result and not killed:
        return Ended(*json.loads(result))
    return Ended(killed or f"ended by signal {os.WTERMSIG(status)}", "", False, "", time.monotonic() - begin, 0)


def _outcome(action: Callable[[], object]) -> tuple[str, str, bool, str, float, int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name, message, expected, where = "", "", True, ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            action()
        except BaseException as error:
            name, message = type(error).__name__, str(error).replace("\n", " ")[:2000]
            expected = isinstance(error, (Llama4Error, OSError))
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "llama4" in f.filename.split(os.sep)]
            where = f"at {' '.join(ours[-3:])}"
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        name,
        message,
        expected,
        where,
        time.process_time(),
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit,
    )


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
