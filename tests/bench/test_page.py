"""The pages and the picture show what docs/performance.json and docs/faults.json have, and the JSON comes from the
commands that it names."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama4.bench.__main__ import BENCHES
from llama4.cli.main import main
from llama4.kernels import loader
from tests.faults import __main__ as faults
from tests.faults import limits

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("measure")


@pytest.fixture
def figures(measure: ModuleType) -> ModuleType:
    return measure.figures


def test_pages_and_picture_show_the_results(measure: ModuleType, figures: ModuleType) -> None:
    results, found = figures.load(), []
    for path in figures.PAGES:
        page = path.read_text(encoding="utf-8")
        assert figures.render(page, results) == page, f"{path.name} differs: python docs/figures.py renders it"
        found += [match["name"] for match in figures.BLOCK.finditer(page)]
    assert figures.bars.draw(results["small"]["report"]) == figures.PICTURE.read_text(encoding="utf-8")
    assert set(found) == {"speed", "faults", *measure.RUNS}, "every run is shown"
    assert len(found) == len(set(found)), "once"


def test_nothing_that_was_tried_fails(figures: ModuleType) -> None:
    """And all cases of today are on the page."""
    groups = json.loads(figures.FAULTS.read_text(encoding="utf-8"))
    counts = {name: group["counts"] for name, group in groups.items()}
    assert not {kind: failed for group in counts.values() for kind, (_, failed) in group.items() if failed}
    assert set(counts["limits"]) == set(limits.CASES)
    assert set(counts["tests"]) <= set(faults.TESTS)
    assert sum(tried for tried, _ in counts["writers"].values()) > 5000
    assert len(counts["damage"]) > 25


def test_results_are_of_the_commands(measure: ModuleType, figures: ModuleType) -> None:
    results = figures.load()
    assert list(results) == [name for name in measure.RUNS if name in results]
    for name, run in results.items():
        assert run["command"] == measure.RUNS[name]
        assert re.fullmatch(rf"([A-Z\d_]+=\S+ )*llama4 bench ({'|'.join(BENCHES)})( .+)?", run["command"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"])
        assert run["report"]["machine"]["cores"] > 0


def test_a_page_follows_the_results(figures: ModuleType) -> None:
    """A changed figure changes the page and nothing outside the markers."""
    results = figures.load()
    page = "# A\n\n<!-- figures: speed -->\nold\n<!-- end -->\n\nmiddle\n\n<!-- figures: mav -->\n<!-- end -->\n"
    first = figures.render(page, results)
    for run in ("small", "mav"):
        figure = next(f for f in results[run]["report"]["figures"] if f["task"] == "decode, batch 1")
        figure["median"] = 123456.0
    second = figures.render(first, results)
    assert second.count("123,456") == 2
    assert "123,456" not in first
    assert "old" not in first
    assert "Not measured yet." in figures.render("<!-- figures: new -->\n<!-- end -->\n", results)
    assert re.sub(r"((?:speed|mav) -->\n).*?(<!-- end)", r"\1\2", second, flags=re.DOTALL) == page.replace("old\n", "")


def test_a_measured_report_is_stored_and_rendered(
    measure: ModuleType,
    figures: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a benchmark's JSON to the page; a run that is new stands where RUNS has it."""
    command = "bench moe --hidden-size 64 --width 64 --experts 2 --tokens 1 --rounds 1 --backends loop --dtype float32"
    capsys.readouterr()
    assert main([*command.split(), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    stored = figures.load()
    names = list(stored)
    del stored["experts"]
    results.write_text(measure.dump(stored))
    page.write_text("<!-- figures: experts -->\n<!-- end -->\n")
    monkeypatch.setitem(measure.RUNS, "experts", f"llama4 {command}")
    monkeypatch.setattr(measure, "run", lambda command, directory: report)
    monkeypatch.setattr(figures, "RESULTS", results)
    monkeypatch.setattr(figures, "PAGES", [page])
    monkeypatch.setattr(figures, "PICTURE", tmp_path / "picture.svg")
    measure.main(".", ["experts"])
    assert f"```\nllama4 {command}\n```" in page.read_text()
    assert "2 experts of 64 x 64" in page.read_text()
    assert list(figures.load()) == names
    assert (tmp_path / "picture.svg").read_text() == figures.bars.draw(figures.load()["small"]["report"])
    with pytest.raises(SystemExit, match="no such run: nothing"):
        measure.main(".", ["nothing"])


def test_variables_before_a_command_are_its_environment(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0, stdout='{"rounds": 3}')

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("LLAMA4_CPU", raising=False)
    assert measure.run("LLAMA4_CPU=avx2 A=b=c llama4 bench moe", ".") == {"rounds": 3}
    assert measure.run("llama4 bench moe", ".") == {"rounds": 3}
    assert [command[2:] for command, _ in calls] == 2 * [["llama4", "bench", "moe", "--json"]]
    assert [(env.get("LLAMA4_CPU"), env.get("A")) for _, env in calls] == [("avx2", "b=c"), (None, None)]


@pytest.mark.parametrize("level", ["avx2", "avx512vnni"])
def test_without_names_runs_of_other_cpus_are_left_out(
    measure: ModuleType, figures: ModuleType, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    commands: list[str] = []
    monkeypatch.setattr(measure.loader, "found", lambda: loader.Found(None, level, ""))
    monkeypatch.setattr(measure, "run", lambda command, directory: commands.append(command))
    monkeypatch.setattr(measure, "replace_text", lambda path, text: None)
    monkeypatch.setattr(figures, "main", lambda: None)
    measure.main(".")
    others = set(measure.LEVELS) if level == "avx2" else set()
    assert commands == [command for name, command in measure.RUNS.items() if name not in others]


def test_json_keeps_six_digits(measure: ModuleType) -> None:
    text = measure.dump({"a": {"samples": [1.23456789, 2], "name": "x [1,\n 2]"}, "b": None})
    assert json.loads(text) == {"a": {"samples": [1.23457, 2], "name": "x [1,\n 2]"}, "b": None}
    assert '{ "samples": [ 1.23457, 2 ],' in text


def test_a_bar_is_as_long_as_its_share_of_the_bound(figures: ModuleType) -> None:
    def figure(engine: str, unit: str, median: float, share: float) -> dict[str, Any]:
        return {"task": "decode", "engine": engine, "unit": unit, "median": median, "roofline_share": share}

    shown = [
        figure("llama4", "tokens/s", 80.0, 0.8),
        figure("llama4, int4", "tokens/s", 200.0, 0.5),
        figure("other <1>", "tokens/s", 12.0, 0.1),
    ]
    machine = {"cpu": "A & B", "cores": 2, "torch": "2.15.0+cpu"}
    report = {"figures": [*shown, figure("llama4", "s", 1.0, 1.0)], "machine": machine, "parameters": 9e8, "rounds": 3}
    drawn = figures.bars.draw(report)
    assert "A &amp; B" in drawn
    assert "other &lt;1&gt;" in drawn
    bars = dict(re.findall(r'class="(?:ours|other)" x="\d+" y="(\d+)" width="([\d.]+)"', drawn))
    bounds = dict(re.findall(r'class="bound" x="\d+" y="(\d+)" width="([\d.]+)"', drawn))
    shares = [float(bars[y]) / float(bounds[y]) for y in bars]
    assert shares == pytest.approx([each["roofline_share"] for each in shown], rel=0.02)
