"""What control groups allow: files as Linux writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llama4 import control_groups
from llama4.control_groups import available_memory, cpu_quota, memory_limit


def written(membership: str, files: dict[str, str], directory: Path) -> tuple[Path, Path]:
    """The groups that a process is in, and the root of all, as files."""
    groups = {f"groups/{name}": text for name, text in files.items()}
    for name, text in {"membership": membership, **groups}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text + "\n")
    return directory / "membership", directory / "groups"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {}, math.inf),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, math.inf),
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "100000 200000", "a/b/cpu.max": "150000 100000"}, 0.5),
        ("0::/not/seen/here", {"cpu.max": "150000 100000"}, 1.5),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("2:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, math.inf),
        ("3:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"}, math.inf),
    ],
)
def test_quotas_of_control_groups(membership: str, files: dict[str, str], quota: float, tmp_path: Path) -> None:
    assert cpu_quota(*written(membership, files, tmp_path)) == quota


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/", {}, math.inf),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "4096"}, 4096),
        ("0::/a", {"a/memory.max": "8192", "memory.max": "16384"}, 8192),
        ("0::/outside/a", {"memory.max": "8192"}, 8192),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "4096", "memory.max": "1"}, 4096),
        ("1:cpu:/a", {"cpu/a/memory.limit_in_bytes": "4096"}, math.inf),
    ],
)
def test_memory(membership: str, files: dict[str, str], limit: float, tmp_path: Path) -> None:
    assert memory_limit(*written(membership, files, tmp_path)) == limit


@pytest.mark.parametrize(("available", "limit", "free"), [(8, 2, 2048), (1, 2, 1024), (1, None, 1024)])
def test_free_memory(available: int, limit: int | None, free: int, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 16 kB\nMemAvailable:   {available} kB\n")
    monkeypatch.setattr(control_groups, "memory_limit", lambda: math.inf if limit is None else 1024 * limit)
    assert available_memory(tmp_path / "meminfo") == free
    assert available_memory(tmp_path / "none") == (math.inf if limit is None else 1024 * limit)
