"""The quick part of damage.py, on every run, and what its long part found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import damage


def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = damage.run(3, 0, tmp_path)
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.tried.total() == 3 * len(tally.tried) > 120
    assert not tally.failed
