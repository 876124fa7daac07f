"""What control groups allow: files as Linux writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/", {}, 8192),
        ("0::/a", {"a/memory.max": "max", "a/memory.current": "4096"}, 8192),
        ("0::/a", {"a/memory.max": "6000", "a/memory.current": "4096"}, 1904),
        (
            "0::/a",
            {"a/memory.max": "6000", "a/memory.current": "4096", "a/memory.stat": "anon 9\ninactive_file 90"},
            1994,
        ),
        ("0::/a/b", {"a/b/memory.max": "9000", "a/memory.max": "5000", "a/memory.current": "4500"}, 500),
        ("0::/a", {"a/memory.max": "20000", "a/memory.current": "4096"}, 8192),
        ("0::/a", {"a/memory.max": "4000", "a/memory.current": "4096"}, 0),
        (
            "4:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": "6000",
                "memory/a/memory.usage_in_bytes": "4096",
                "memory/a/memory.stat": "active_file 1\ntotal_active_file 20\ntotal_inactive_file 4",
            },
            1928,
        ),
    ],
)
def test_free_memory(membership: str, files: dict[str, str], free: int, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable:   8 kB\n")
    assert available_memory(tmp_path / "meminfo", *written(membership, files, tmp_path)) == free


def test_free_memory_where_nothing_says(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "none", *written("0::/", {}, tmp_path)) == math.inf
