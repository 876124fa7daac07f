"""Absurd files cost little: limits.py in a process of its own, so that what it takes is not hidden by other tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.faults import limits

ROOT = Path(__file__).parents[2]
RUN = f"import sys; sys.path.append({str(ROOT)!r}); from tests.faults.limits import main; sys.exit(main())"


def test_absurd_files_cost_little() -> None:
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{5 * len(limits.CASES)} tried     0 failed" in done.stdout
