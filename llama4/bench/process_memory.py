"""Memory of processes and what they read from disks, in bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PROC, CLEAR_REFS, IO = Path("/proc"), Path("/proc/self/clear_refs"), Path("/proc/self/io")


def resident_bytes() -> int:
    """Resident memory now, mapped files that were read included; on systems other than Linux the peak."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The largest resident memory, since `reset_peak` where the system supports that."""
    return _status("VmHWM")


def peak_bytes_of(pid: int) -> int:
    """The largest resident memory that a child has had; 0 once it has ended. Its rusage would not do: on Linux that
    begins with the memory of the process that started it. Elsewhere the most that any ended child had."""
    try:
        return _of_linux("VmHWM", str(pid)) if PROC.is_dir() else _of_rusage(is_self=False)
    except OSError:
        return 0


def anonymous_bytes() -> int:
    """Memory that is this process's own, now, without files that are mapped; on systems other than Linux the peak of
    both."""
    return _status("RssAnon")


def bytes_read() -> int | None:
    """What disks have read for this process so far; None where the system does not tell."""
    try:
        found = re.search(r"^read_bytes: (\d+)", IO.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def reset_peak() -> None:
    """Start counting the peak anew."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return


def _status(field: str) -> int:
    return _of_linux(field, "self") if PROC.is_dir() else _of_rusage(is_self=True)


def _of_linux(field: str, process: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", (PROC / process / "status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0  # a process that has ended and was not waited for has no memory


def _of_rusage(*, is_self: bool) -> int:
    import resource  # Windows has none

    largest = resource.getrusage(resource.RUSAGE_SELF if is_self else resource.RUSAGE_CHILDREN).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
