"""docs/performance.md and its picture: the commands are such that run, and what they print gets to its place."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama4.bench.__main__ import BENCHES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    spec = importlib.util.spec_from_file_location("measure", DOCS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "draw_performance")
    return module


def test_the_picture_shows_the_results(measure: ModuleType) -> None:
    """A bar for all that is counted in tokens, as long beside its outline as the share of the floor."""

    def figure(contestant: str, tokens: int, median: float, share: float) -> dict[str, Any]:
        return {
            "task": "decode, batch 1",
            "contestant": contestant,
            "tokens": tokens,
            "median": median,
            "share_of_floor": share,
        }

    shown = [figure("llama4", 1, 80.0, 0.8), figure("llama4, int4", 1, 200.0, 0.5), figure("other <1>", 1, 12.0, 0.1)]
    machine = {"cpu": "A & B", "cores": 2, "torch": "2.15.0+cpu"}
    results = {"figures": [*shown, figure("llama4", 0, 1.0, 1.0)], "machine": machine, "parameters": 9e8, "rounds": 3}
    drawn = measure.draw_performance.draw(results)
    assert "A &amp; B" in drawn
    assert "other &lt;1&gt;" in drawn
    bars = dict(re.findall(r'class="(?:ours|other)" x="\d+" y="(\d+)" width="([\d.]+)"', drawn))
    floors = dict(re.findall(r'class="floor" x="\d+" y="(\d+)" width="([\d.]+)"', drawn))
    shares = [float(bars[y]) / float(floors[y]) for y in bars]
    assert shares == pytest.approx([each["share_of_floor"] for each in shown], rel=0.02)


def test_the_picture_is_of_the_results_beside_it(measure: ModuleType) -> None:
    if (DOCS / "performance.json").exists():
        drawn = measure.draw_performance.draw(json.loads((DOCS / "performance.json").read_text(encoding="utf-8")))
        assert drawn == (DOCS / "performance.svg").read_text(encoding="utf-8"), (
            "python docs/draw_performance.py draws it"
        )


def test_output_takes_the_place_of_the_old(
    measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, done = tmp_path / "page.md", list[str]()

    def run(command: str, directory: str) -> str:
        done.append(command)
        return f"| {command} |\n"

    old = "before\n\n```\nllama4 bench moe --markdown\n```\n\n<!-- measured -->\n| old\n1 |\n<!-- end -->\n\n"
    page.write_text(old + old.replace("moe", "images") + "after\n")
    monkeypatch.setattr(measure, "PAGE", page)
    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(measure.draw_performance, "main", lambda: None)
    measure.main(".", ["images"])
    assert done == ["bench images --markdown"]
    assert (
        page.read_text()
        == old + old.replace("moe", "images").replace("| old\n1 |", "| bench images --markdown |") + "after\n"
    )


def test_commands_of_the_page_are_known(measure: ModuleType) -> None:
    commands: list[Any] = [
        block["command"].split() for block in measure.BLOCK.finditer(measure.PAGE.read_text("utf-8"))
    ]
    assert len(commands) > 8
    assert {command[1] for command in commands} == {"generate", "profile", "growth", "moe", "images"} <= set(BENCHES)
    assert all("--markdown" in command for command in commands)
