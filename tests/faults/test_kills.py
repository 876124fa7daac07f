"""A sample of what `python -m tests.faults.kills` tries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import events

ROOT = Path(__file__).parents[2]
RUN = f"import sys; sys.path.append({str(ROOT)!r}); from tests.faults.kills import main; sys.exit(main(sys.argv[1:]))"


def permitted() -> bool:
    try:
        return events.is_supported() and not events.run(lambda: None, Path("/")).error
    except OSError:
        return False


@pytest.mark.skipif(not permitted(), reason="a process is watched with Linux's ptrace on x86-64")
def test_a_sample_of_kills_and_full_disks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, "--sample", "1", "--pairs", "1", "--folder", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    # three ends of nineteen writers, and a pair
    assert re.search(r"^in all +58 tried +0 failed$", done.stdout, re.MULTILINE)


@pytest.mark.skipif(not permitted(), reason="a process is watched with Linux's ptrace on x86-64")
def test_what_a_fault_does_to_a_file_that_is_overwritten(tmp_path: Path) -> None:
    """The tool finds what it is for."""
    file = tmp_path / "file"

    def overwrite() -> None:
        file.write_bytes(b"new" * 1000)

    sizes = set()
    for kind, at in (("kill", 1), ("power", 2), ("full", 1)):
        file.write_bytes(b"old")
        outcome = events.run(overwrite, tmp_path, kind, at)  # type: ignore[arg-type]
        assert outcome.events[:2] == ("openat", "write")
        sizes.add((kind, file.stat().st_size, outcome.killed))
    assert sizes == {("kill", 1500, True), ("power", 3000, False), ("full", 0, False)}
