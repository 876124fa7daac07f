"""What this machine can do at most, and what a process takes of it."""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Memory that this process holds now, files that it maps and has read included; elsewhere than on Linux the most it
    ever held."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most it held, since `reset_peak` if the system can do that."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Count the peak from here on."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def _status(field: str) -> int:
    if not STATUS.exists():
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024
    found = re.search(rf"{field}:\s+(\d+)", STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median of several runs, after one that is not counted."""
    run()
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)


def memory_rate(size: int = 300_000_000) -> float:
    """Bytes per second that all threads read, of far more than the caches hold."""
    numbers = torch.ones(size // 4)
    return size / seconds(numbers.sum)


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second of a large product, by the best way that torch has."""
    x, weight = torch.ones(size, size, dtype=dtype), torch.ones(2 * size, size, dtype=dtype)
    ways: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)]
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    with torch.inference_mode():
        return 4 * size**3 / min(seconds(way) for way in ways)
