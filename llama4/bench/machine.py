"""What this machine is and does at most, and what a run takes of it: time, and memory of the process."""

from __future__ import annotations

import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4.weights import memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CPUINFO, STAT = Path("/proc/cpuinfo"), Path("/proc/stat")


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
    return statistics.median(timed(run) for _ in range(repeats))


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Rates:
    """What a machine does at most: bytes read per second, and floating-point operations of a large product."""

    memory: float
    gemm: float


class Ceilings:
    """Measures the machine at its best, again and again, because it drifts.

    Memory is read by summing far more numbers than the caches hold, in large pages where there are such; the product is
    of 2048 rows with a matrix of that many inputs and outputs, by the best way that torch has for a weight as it lies.
    """

    def __init__(
        self, dtype: torch.dtype, threads: int, device: str = "cpu", *, size: int = 2048, read: int = 300_000_000
    ) -> None:
        self._threads, self._flops, self._bytes = threads, 2 * size**3, read
        x, weight = torch.ones(2, size, size, dtype=dtype, device=device)
        numbers = torch.ones(read // 4, device=device)
        if numbers.device.type == "cpu":
            numbers = memory.keep(numbers)
        self._sum = lambda: numbers.sum().item()
        self._products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)[0, 0].item()]
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype != torch.float64:
            onednn = torch.ops.mkldnn._linear_pointwise
            self._products.append(lambda: onednn(x, weight, None, "none", [], "")[0, 0].item())

    @torch.inference_mode()
    def measure(self, repeats: int = 3) -> Rates:
        """The fastest of a few runs."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            memory = _fastest(self._sum, 3 * repeats)
            products = [_fastest(run, repeats) for run in self._products]
        finally:
            torch.set_num_threads(before)
        return Rates(self._bytes / memory, self._flops / min(products))


def _fastest(run: Callable[[], object], repeats: int) -> float:
    run()
    return min(timed(run) for _ in range(repeats))


class Others:
    """How much of the cores processes other than some have taken since the last question, 0 to 1; None where the system
    does not say."""

    def __init__(self) -> None:
        self._last = self._now([os.getpid()])

    def share(self, mine: Iterable[int] = ()) -> float | None:
        """Since the last call; `mine` are processes beside this one that do not count."""
        last, self._last = self._last, self._now([os.getpid(), *mine])
        if last is None or self._last is None:
            return None
        (all_before, own_before), (all_now, own_now) = last, self._last
        idle, busy = (now - before for now, before in zip(all_now, all_before, strict=True))
        own = sum(taken - own_before.get(process, 0) for process, taken in own_now.items())
        return max(0.0, busy - own) / max(idle + busy, 1)

    @staticmethod
    def _now(processes: Iterable[int]) -> tuple[tuple[int, int], dict[int, int]] | None:
        """Clock ticks: of all cores idle and busy, and of each process with the children that it has buried."""
        try:
            ticks = [int(tick) for tick in STAT.read_text(encoding="ascii").split("\n")[0].split()[1:9]]
            own = {}
            for process in processes:
                fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                own[process] = sum(int(tick) for tick in fields[11:15])
        except (OSError, ValueError, IndexError):
            return None
        idle = ticks[3] + ticks[4]
        return (idle, sum(ticks) - idle), own


def describe(threads: int | None = None) -> dict[str, Any]:
    """What a report says of the machine."""
    found = re.search(r"model name\s*:\s*(.+)", CPUINFO.read_text(encoding="utf-8")) if CPUINFO.exists() else None
    about = {
        "cpu": found[1] if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about
