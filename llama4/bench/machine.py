"""What a run takes: time, and memory of the process."""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
