"""What this machine is, and how much of it other processes use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

CPUINFO, STAT = Path("/proc/cpuinfo"), Path("/proc/stat")


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


class OtherProcesses:
    """The share of all cores' time that processes other than some have used since the last question."""

    def __init__(self) -> None:
        self._last = self._now([os.getpid()])

    def share(self, own: Iterable[int] = ()) -> float | None:
        """0 to 1, since the last call; None where the system does not tell. `own` are ids of processes beside this one
        that do not count."""
        last, self._last = self._last, self._now([os.getpid(), *own])
        if last is None or self._last is None:
            return None
        (all_before, own_before), (all_now, own_now) = last, self._last
        idle, busy = (now - before for now, before in zip(all_now, all_before, strict=True))
        used = sum(ticks - own_before.get(process, 0) for process, ticks in own_now.items())
        return max(0.0, busy - used) / max(idle + busy, 1)

    @staticmethod
    def _now(processes: Iterable[int]) -> tuple[tuple[int, int], dict[int, int]] | None:
        """Clock ticks: of all cores idle and busy, and of each process with its finished children."""
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
