"""What Linux, and its control groups of versions 1 and 2, allow this process: a container's limits are there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")


def cpu_quota(membership: Path = MEMBERSHIP, root: Path = ROOT) -> float:
    """Seconds of computing per second; infinite where no group says."""
    least = math.inf
    for version, directory in _groups("cpu", membership, root):
        files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        numbers = " ".join(text_of(directory / file) for file in files).split()
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers) and int(numbers[1]):
            least = min(least, int(numbers[0]) / int(numbers[1]))
    return least


def memory_limit(membership: Path = MEMBERSHIP, root: Path = ROOT) -> float:
    """Bytes of memory; infinite where no group says."""
    files = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = [text_of(directory / files[version]) for version, directory in _groups("memory", membership, root)]
    return min((int(limit) for limit in limits if limit.isdecimal()), default=math.inf)


def available_memory(path: Path = MEMORY) -> float:
    """Bytes of memory that are free, or that the system would free, within the limit; infinite where nothing says."""
    fields = [line.split() for line in text_of(path).splitlines() if line.startswith("MemAvailable:")]
    return min(1024 * int(fields[0][1]) if fields else math.inf, memory_limit())


def text_of(path: Path) -> str:
    """Of a small file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _groups(controller: str, membership: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and directory of each group that limits this process."""
    for line in text_of(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controller if controllers else root
        group = mount / path.lstrip("/")
        for directory in (group, *group.parents):  # a container may not see what its group is called outside
            if not directory.is_relative_to(mount):
                break
            yield 1 if controllers else 2, directory
