"""Seconds on a device; CUDA graphs; what the host waits for; kernels by time."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity

TOP = 20
"""Kernels of a profile that are listed."""


def seconds(run: Callable[[], object], device: torch.device, budget: float, most: int) -> float:
    """Median of several runs, after two that are not counted; they end when `budget` seconds are spent."""
    run()
    run()
    first = _host_seconds(run, device)
    repeats = max(3, min(most, int(budget / max(first, 1e-6))))
    if device.type != "cuda":
        return statistics.median(_host_seconds(run, device) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def once(run: Callable[[], object], device: torch.device) -> float:
    """One run, from the host's view."""
    synchronize(device)
    return _host_seconds(run, device)


def _host_seconds(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def host_seconds_each(run: Callable[[], object], device: torch.device, count: int = 500) -> float:
    """What one of several runs takes the host, which does not wait for the device; the least of three times."""
    times = []
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            run()
        times.append((time.perf_counter() - begin) / count)
    synchronize(device)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back memory that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def graph(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A run captured in a CUDA graph -> its replay. Without CUDA the run itself.

    What the run reads and writes stays where it is, so a replay computes the same from what is there by then.
    """
    if device.type != "cuda":
        return lambda: (run(), None)[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and makes handles, which must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Within, an operation that makes the host wait for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_waits(run: Callable[[], object], device: torch.device) -> int:
    """How often the host waits for the device in one run, as far as torch sees it."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def profile(
    run: Callable[[], object], device: torch.device
) -> tuple[list[dict[str, float | str]], dict[str, float | str]]:
    """One run -> its kernels, those that took longest first, and figures of the whole: the share of the time in which
    the device computed is what launches and the host cost."""
    on_gpu = device.type == "cuda"
    run()
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as watched:
        wall = once(run, device)
    found: list[tuple[float, int, str]] = []
    for event in watched.key_averages():
        is_kernel = event.device_type != DeviceType.CPU
        if is_kernel or not on_gpu:
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found.append((float(spent), int(event.count), str(event.key)))
    found.sort(reverse=True)
    total = sum(spent for spent, _, _ in found) or 1.0
    kernels: list[dict[str, float | str]] = [
        {"kernel": name[:120], "ms": spent / 1e3, "share": spent / total, "calls": count}
        for spent, count, name in found[:TOP]
    ]
    figures: dict[str, float | str] = {
        "wall_ms": wall * 1e3,
        "kernels_ms": total / 1e3,
        "busy_share": total / 1e6 / wall,
        "launches": sum(count for _, count, _ in found),
        "longest": str(kernels[0]["kernel"])[:60] if kernels else "",
    }
    return kernels, figures
