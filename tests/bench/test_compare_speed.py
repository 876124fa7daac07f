"""scripts/compare_speed.py: its intervals, and a comparison of this checkout with itself."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("compare_speed")


def test_the_interval_of_a_median(compare: ModuleType) -> None:
    """Nine ratios: from the second to the eighth, which covers 96.1% (Conover, Practical Nonparametric Statistics)."""
    assert compare.interval([9, 1, 2, 3, 8, 4, 5, 6, 7]) == (2, 8, pytest.approx(0.9609, abs=1e-4))
    assert compare.interval([1.0, 2.0, 3.0])[:2] == (1.0, 3.0), "too few for 95%: all of it"
    assert compare.interval([1.0, 2.0, 3.0])[2] == pytest.approx(0.75)
    assert compare.interval([1.5]) == (1.5, 1.5, 0.0)


def test_coverage_by_counting(compare: ModuleType) -> None:
    """Each ratio is above or below the true median with equal chance: count all 2^7 ways."""
    low, high, coverage = compare.interval(range(7))
    rank = low
    assert high == 6 - rank
    covered = sum(rank < sum(above) < 7 - rank for above in itertools.product((0, 1), repeat=7))
    assert coverage == pytest.approx(covered / 2**7)
    assert coverage >= 0.95


def test_each_side_begins_as_often(compare: ModuleType) -> None:
    assert [compare.alternating(turn)[0] for turn in range(4)] == [0, 1, 0, 1]


def test_what_is_slower_is_said(compare: ModuleType) -> None:
    lines = list(compare.report({"a": [0.90] * 9, "b": [0.90] * 5 + [1.0] * 4}))
    assert lines[1].endswith("0.900 to 0.900   below 0.97")
    assert lines[2].endswith("0.900 to 1.000")
