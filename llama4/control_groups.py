"""What Linux, and its control groups of versions 1 and 2, allow this process: a container's limits are there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


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
    return min((limit for limit, _ in _memory_groups(membership, root)), default=math.inf)


def available_memory(meminfo: Path = MEMINFO, membership: Path = MEMBERSHIP, root: Path = ROOT) -> float:
    """Bytes of memory that are free, or that the system would free, on the machine and in each group; infinite where
    nothing says."""
    free = [1024 * size for name, size in _fields(meminfo).items() if name == "MemAvailable:"]
    for limit, directory in _memory_groups(membership, root):
        used = text_of(directory / "memory.current") or text_of(directory / "memory.usage_in_bytes")
        files = _fields(directory / "memory.stat")  # of version 1 those with "total_" count groups within this one
        cached = sum(files.get(f"total_{name}", files.get(name, 0)) for name in ("active_file", "inactive_file"))
        free.append(max(0, limit - int(used or 0) + cached))
    return min(free, default=math.inf)


def _memory_groups(membership: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Bytes that each group with a limit may use, and its directory."""
    files = {1: "memory.limit_in_bytes", 2: "memory.max"}
    for version, directory in _groups("memory", membership, root):
        if (limit := text_of(directory / files[version])).isdecimal():
            yield int(limit), directory


def _fields(path: Path) -> dict[str, int]:
    """Of a file with a name and a number in each line."""
    lines = (line.split() for line in text_of(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


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
