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
MUCH, LITTLE = 0.25, 0.05
"""Of the time: from more than the one on they wait asleep, and below the other awake again."""
_TASKS = Path("/proc/self/task")
_PARALLEL = 1 << 18
"""Numbers that torch shares among its threads."""


@contextmanager
def considerate() -> Iterator[None]:
    """Inside, torch's threads wait for each other asleep while other processes have their cores."""
    if torch.get_num_threads() == 1 or not _TASKS.is_dir():
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="llama4-openmp", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: threading.Event) -> None:
    awake: threading.Event | None = None
    wanted, now = _wanted(), time.monotonic()
    while not ended.wait(SECONDS):
        wanted_before, before = wanted, now
        wanted, now = _wanted(), time.monotonic()
        share = (wanted - wanted_before) / (now - before)
        if awake is None and share > MUCH:
            awake = threading.Event()
            threading.Thread(target=_sleep, args=(awake,), name="llama4-openmp-sleeper", daemon=True).start()
        elif awake is not None and share < LITTLE:
            awake.set()
            awake = None
    if awake is not None:
        awake.set()


def _sleep(awake: threading.Event) -> None:
    """With a team, which goes when this thread does."""
    torch.zeros(_PARALLEL).add_(1)
    awake.wait()


def _wanted() -> float:
    """Seconds in which our threads could have computed, and had no core."""
    nanoseconds = 0
    for task in _TASKS.iterdir():
        with suppress(OSError, ValueError, IndexError):  # a thread may be gone
            nanoseconds += int((task / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9
