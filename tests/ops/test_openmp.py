"""torch's threads sleep while they wait, as long as other processes have their cores."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama4.ops import openmp

MAPS = Path("/proc/self/maps")
needs_libgomp = pytest.mark.skipif(
    not MAPS.exists() or "libgomp" not in MAPS.read_text() or torch.get_num_threads() == 1,
    reason="of threads of GNU's OpenMP",
)


def sleepers() -> int:
    return sum(thread.name == "llama4-openmp-sleeper" for thread in threading.enumerate())


def until(holds: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() < begun + 60
        time.sleep(0.01)


def burnt() -> float:
    """Seconds of the processor that threads spend on waiting, of 0.4 between products."""
    x = torch.ones(1 << 18)
    total = 0.0
    for _ in range(40):
        x.add_(1)
        before = time.process_time()
        time.sleep(0.01)
        total += time.process_time() - before
    return total


@needs_libgomp
def test_they_sleep_while_others_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [1.0, 0.0]  # that threads waited for a core, at each look; and per look

    def waited() -> float:
        seconds[0] += seconds[1]
        return seconds[0]

    monkeypatch.setattr(openmp, "_waited", waited)
    monkeypatch.setattr(openmp, "SECONDS", 0.01)
    if (awake := burnt()) < 0.02:
        pytest.skip("they sleep already")
    with openmp.passive_waiting():
        seconds[1] = 1.0
        until(lambda: sleepers() == 1)
        until(lambda: burnt() < awake / 2)
        seconds[1] = 0.0
        until(lambda: sleepers() == 0)
        seconds[1] = 1.0
        until(lambda: sleepers() == 1)
    until(lambda: sleepers() == 0)


def test_nobody_sleeps_behind_a_watch_that_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([1.0, 1.0, 9.0])  # and then none

    monkeypatch.setattr(openmp, "_waited", lambda: next(looks))
    monkeypatch.setattr(openmp, "SECONDS", 0.01)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with openmp.passive_waiting():
        until(lambda: next(looks, None) is None)
    until(lambda: sleepers() == 0)


@pytest.mark.skipif(not openmp._waited(), reason="the system does not say")
def test_what_threads_wait_for_a_core_is_seen() -> None:
    """Of more threads that compute than there are cores, some always wait."""
    before, begun = openmp._waited(), time.monotonic()
    ended = threading.Event()

    def compute() -> None:
        while not ended.is_set():
            hashlib.sha256(bytes(1 << 22))  # without the GIL

    threads = [threading.Thread(target=compute) for _ in range(2 * len(os.sched_getaffinity(0)))]
    for thread in threads:
        thread.start()
    time.sleep(1)
    after, took = openmp._waited(), time.monotonic() - begun
    ended.set()
    for thread in threads:
        thread.join()
    assert after - before > openmp.SLEEP_ABOVE * took
