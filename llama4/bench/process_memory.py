"""Memory of this process, in bytes."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident memory now, mapped files that were read included; on systems other than Linux the peak."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The largest resident memory, since `reset_peak` where the system supports that."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Start counting the peak anew."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return


def _status(field: str) -> int:
    if not STATUS.exists():
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024
    found = re.search(rf"{field}:\s+(\d+)", STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024
