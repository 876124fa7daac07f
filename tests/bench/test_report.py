"""Numbers, tables, the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama4 import progress
from llama4.bench import machine, peak_rates, report
from llama4.bench.machine import OtherProcesses
from llama4.bench.peak_rates import PeakProbe
from llama4.bench.report import Spread, number, table


def test_numbers_have_three_digits_that_count() -> None:
    given = (0, 0.01234, 0.5678, 1.2345, 9.996, 12.345, 99.96, 123.45, 12345.6)
    assert [number(value) for value in given] == [
        "0",
        "0.0123",
        "0.568",
        "1.23",
        "10.0",
        "12.3",
        "100",
        "123",
        "12,346",
    ]


def test_a_spread_is_median_and_ends() -> None:
    assert str(Spread.of([3.0, 1.0, 2.0, 9.0])) == "2.50 (1.00-9.00)"
    assert str(Spread.of([7.0])) == "7.00"


def test_tables() -> None:
    rows = [["a", "1"], ["long name", "20"]]
    assert table(["", "x"], rows) == "             x\na            1\nlong name   20"
    assert table(["", "x"], rows, markdown=True) == "|  | x |\n| --- | --: |\n| a | 1 |\n| long name | 20 |"


def test_own_processes_do_not_count_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "STAT", stat)
    stat.write_text("cpu  1000 0 500 8000 100 0 0 0 0 0\ncpu0 1 2 3\n")
    others = OtherProcesses()
    stat.write_text("cpu  2500 0 1000 10000 100 0 0 0 0 0\n")
    share = others.share()
    assert share == pytest.approx(0.5, abs=0.05), "2000 ticks of 4000, less the few of this process"
    report.warn_of_other_processes([0.01, share])
    assert "other processes used up to 5" in capsys.readouterr().err
    assert others.stolen() == 0.0
    report.warn_of_other_processes([None, 0.01])
    assert not capsys.readouterr().err
    stat.write_text("cpu  2500 0 1000 10000 100 0 0 1000 0 0\n")
    report.warn_of_other_processes([0.01, 0.2, 0.5], others.stolen())
    said = capsys.readouterr().err
    assert "during 2 of 3 samples" in said
    assert "the host took 20%" in said, "1000 ticks of 5000"
    stat.unlink()
    assert (others.share(), others.stolen()) == (None, None)


def test_who_sees_no_bar_gets_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    assert list(report.shown(["one", "two"])) == ["one", "two"]
    assert capsys.readouterr().err.splitlines()[-1] == "llama4: measuring two, 1 of 2 steps"


def test_peak_rates_leave_out_what_a_cpu_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has no product of bfloat16 on AVX2."""

    def refused() -> object:
        raise RuntimeError("could not create a primitive descriptor for the inner product")

    monkeypatch.setattr(peak_rates, "_products", lambda x, weight: [refused, lambda: x @ weight])
    assert PeakProbe(torch.float32, 1, size=64, read=4096).measure(repeats=1).gemm > 0


def test_peak_rates_run_on_the_threads_that_were_asked_for() -> None:
    before, seen = torch.get_num_threads(), []
    probe = PeakProbe(torch.float32, before + 1, size=64, read=4096)
    probe._products.append(lambda: seen.append(torch.get_num_threads()))
    rates = probe.measure(repeats=1)
    assert rates.memory > 0
    assert rates.gemm > 0
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
