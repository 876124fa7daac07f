"""Benchmarks of tests measure the machine in no time, and so not well."""

from __future__ import annotations

from functools import partialmethod

import pytest

from llama4.bench.peak_rates import PeakProbe


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakProbe, "__init__", partialmethod(PeakProbe.__init__, size=128, read=1 << 20))
