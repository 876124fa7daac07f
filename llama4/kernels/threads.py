"""How many threads the compiled kernels compute with.

They have threads of their own (`kernels/cpp/threads.h`), as many as torch computes with, but never more than run at the
same time: `limit()`. `LLAMA4_THREADS` says another number, whatever torch and the machine say.

torch's threads are OpenMP's. After each operation they spin for milliseconds, on cores that the next kernel wants, and
within one they wait for a thread that the system does not run. So where kernels do the work, what torch does between
them is done by one thread: `torch_by_one_thread()`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from llama4.control_groups import cpu_quota, text_of
from llama4.errors import ArgumentError

VARIABLE = "LLAMA4_THREADS"

_own = threading.local()
"""Of a thread: the kernels' `count` inside `torch_by_one_thread`, and whether torch's number `is_known`."""
_inside: dict[int, int] = {}
"""Threads that are inside -> how many torch computed with before."""
_lock = threading.Lock()
"""Held where torch's number is set or asked for: a thread that begins gets what another set last."""


def _forget_threads() -> None:
    global _lock
    _lock = threading.Lock()
    _inside.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@contextmanager
def torch_by_one_thread() -> Iterator[None]:
    """Inside, the kernels compute with as many threads as before, and torch, called by this thread, with one."""
    before, kernels, thread = _torch_threads(), count(), threading.get_ident()
    if before == 1:
        yield
        return
    _own.count = kernels
    with _lock:
        _inside[thread] = before
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            torch.set_num_threads(before)
            _inside.pop(thread, None)
        del _own.count


def _torch_threads() -> int:
    """How many torch computes with in this thread. A thread gets the number that was set last, in whichever thread,
    when it first calls torch: if another was inside `torch_by_one_thread` then, that is mended here. One that was told
    to compute alone is not told apart from it, if others have set more since."""
    number = torch.get_num_threads()
    if number == 1 and not hasattr(_own, "is_known"):
        with _lock, ThreadPoolExecutor(1) as pool:
            number = max(pool.submit(torch.get_num_threads).result(), *_inside.values(), 1)
            if number > 1:
                torch.set_num_threads(number)
    _own.is_known = True
    return number


def count() -> int:
    """Threads of the next call.

    Raises:
        ArgumentError: LLAMA4_THREADS is no number of threads.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        kept: int | None = getattr(_own, "count", None)
        return kept if kept is not None else min(_torch_threads(), limit())
    if not (asked.isdecimal() and int(asked)):
        raise ArgumentError(f"{VARIABLE} is {asked!r}; it must be a number of threads, 1 or more")
    return int(asked)


@cache
def limit() -> int:
    """Cores that this process may use at once: the physical ones of its CPUs, within its control group's quota."""
    cores = physical_cores(_allowed(), Path("/sys/devices/system/cpu"))
    return max(1, math.ceil(min(cores, cpu_quota())))


def _allowed() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def physical_cores(cpus: Iterable[int], directory: Path) -> int:
    """Cores of these CPUs, of which several may be one core's; the system's directory of CPUs says so."""
    siblings = {text_of(directory / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(siblings)
