"""What control groups allow: files as Linux writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llama4.control_groups import cpu_quota, memory_limit


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
    (tmp_path / "membership").write_text(membership + "\n")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    assert cpu_quota(tmp_path / "membership", tmp_path / "groups") == quota


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
    (tmp_path / "membership").write_text(membership + "\n")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    assert memory_limit(tmp_path / "membership", tmp_path / "groups") == limit
