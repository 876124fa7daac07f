"""torch's own threads beside other processes.

They are OpenMP's, and wait for each other awake: for one that the system does not run, because another process has its
core, the others burn theirs, for up to 15 ms in each operation. libgomp lets them sleep at once while it manages more
threads than there are cores; one more thread that has a team, and sleeps, is enough for that. Who sleeps is woken late,
which costs a third of the speed of small steps where nobody else computes: so it is there only while others do. What is
computed does not depend on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

SECONDS = 0.25
"""From one look at how long our threads wanted a core and had none to the next."""
SLEEP_ABOVE, SPIN_BELOW = 0.25, 0.05
"""Of the time: from more than the one on they wait asleep, and below the other awake again."""
_TASKS = Path("/proc/self/task")
_PARALLEL = 1 << 18
"""Numbers that torch shares among its threads."""


@contextmanager
def passive_waiting() -> Iterator[None]:
    """Inside, torch's threads wait for each other asleep (OpenMP's OMP_WAIT_POLICY=passive) while other processes have
    their cores; nothing where the system does not say how long threads had none."""
    threads = torch.get_num_threads()
    if threads == 1 or not _waited():
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended, threads), name="llama4-openmp", daemon=True)
    try:
        watch.start()
        yield
    finally:
        ended.set()
        if watch.ident is not None:
            watch.join()


def _watch(ended: threading.Event, threads: int) -> None:
    wake: threading.Event | None = None  # of the sleeper, if there is one
    waited, now = _waited(), time.monotonic()
    try:
        while not ended.wait(SECONDS):
            waited_before, before = waited, now
            waited, now = _waited(), time.monotonic()
            share = (waited - waited_before) / (now - before)
            if wake is None and share > SLEEP_ABOVE:
                event = threading.Event()
                arguments = event, threads
                threading.Thread(target=_sleep, args=arguments, name="llama4-openmp-sleeper", daemon=True).start()
                wake = event
            elif wake is not None and share < SPIN_BELOW:
                wake.set()
                wake = None
    finally:
        if wake is not None:
            wake.set()


def _sleep(wake: threading.Event, threads: int) -> None:
    """With a team of so many threads, which goes when this thread does."""
    with suppress(RuntimeError):  # no memory for it
        if torch.get_num_threads() == 1:  # it began inside of `torch_by_one_thread`
            torch.set_num_threads(threads)
        torch.zeros(_PARALLEL).add_(1)
    wake.wait()


def _waited() -> float:
    """Seconds in which our threads could have computed, and had no core; 0 where the system does not say."""
    nanoseconds = 0
    with suppress(OSError):  # there is no /proc
        for task in _TASKS.iterdir():
            with suppress(OSError, ValueError, IndexError):  # a thread may be gone
                nanoseconds += int((task / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9
