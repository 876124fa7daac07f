"""What this machine is, and how much of it other processes use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llama4.kernels import build, loader
from llama4.version import __version__

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
        "kernels": kernels_text(loader.found()),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def kernels_text(found: loader.Found) -> str:
    return found.level or f"none, torch serves: {found.why}"


def system() -> dict[str, Any]:
    """What `llama4 info --system` tells: the machine, the CPU kernels that it runs, and why these.

    Raises:
        ValueError: as `loader.found` does.
    """
    found = loader.found()
    return {
        "llama4": __version__,
        **describe(),
        "why these kernels": found.why,
        "levels of this CPU": build.runs(build.cpu_features()),
        "levels built": [*found.built],
        "levels not built": dict(found.problems),
        "compiler": found.compiler,
        "directory": found.directory,
    }


def table(facts: dict[str, Any]) -> str:
    """The facts of `system` as lines of text."""
    lines = {
        **facts,
        "levels of this CPU": ", ".join(facts["levels of this CPU"]) or f"none of {platform.machine()} that are known",
        "levels built": ", ".join(facts["levels built"]) or "none",
        "levels not built": "; ".join(f"{level or 'all'}: {why}" for level, why in facts["levels not built"].items()),
    }
    return "\n".join(f"{name:<20}{value}" for name, value in lines.items() if value != "")


class OtherProcesses:
    """The share of all cores' time that processes other than some have used since the last question."""

    def __init__(self) -> None:
        self._last = self._now([os.getpid()])
        self._stolen = _stolen_ticks()

    def stolen(self) -> float | None:
        """The share of the cores' time since this was made that the host of a virtual machine gave to others; None
        where the system does not tell."""
        if self._stolen is None or (now := _stolen_ticks()) is None:
            return None
        stolen, all_ticks = (after - before for before, after in zip(self._stolen, now, strict=True))
        return stolen / max(all_ticks, 1)

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


def _stolen_ticks() -> tuple[int, int] | None:
    """Clock ticks of all cores: stolen, and all."""
    try:
        ticks = [int(tick) for tick in STAT.read_text(encoding="ascii").split("\n")[0].split()[1:9]]
        return ticks[7], sum(ticks)
    except (OSError, ValueError, IndexError):
        return None
