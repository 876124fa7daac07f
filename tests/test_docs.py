"""The pages are true of the code: the files and tests that they name exist, and calls come in the described order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import llama4
import llama4.vision
from llama4 import Llama4
from llama4.engine.fused_cpu import FusedCpuRunner

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_files_of_the_tour_exist() -> None:
    files = re.findall(r"`((?:llama4|vision|tests|scripts|docs|examples)/[\w/]+\.\w+)`", page("CONTRIBUTING.md"))
    assert len(files) > 20
    assert all((ROOT / file).is_file() for file in files), [file for file in files if not (ROOT / file).is_file()]


@pytest.mark.parametrize("name", ["docs/fidelity.md", "docs/checkpoints.md"])
def test_tests_of_every_line_exist(name: str) -> None:
    rows = [line for line in page(name).splitlines() if line.startswith("|") and "test_" in line]
    assert len(rows) > 25
    for row in rows:
        file = ""
        for cited in re.findall(r"`([\w/]*\.py)?(?:::(\w+))?`", row):
            file = cited[0] or file
            path = ROOT / "tests" / file
            assert path.is_file(), row
            if cited[1]:
                assert re.search(rf"^ *(def|class) {cited[1]}\b", path.read_text(), re.MULTILINE), cited


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_nothing_is_left_to_be_written() -> None:
    left = [path.name for path in PAGES if re.search(r"\bTODO\b|\bMEASURE\b", path.read_text(encoding="utf-8"))]
    assert not left


def test_the_way_of_a_picture_and_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk of docs/architecture.md, against the order in which a chat first calls each function."""
    monkeypatch.setattr(FusedCpuRunner, "prompt_description", lambda runner, cache: None)  # the modules read it
    steps = re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", page("docs/architecture.md"), re.MULTILINE)
    assert len({file for file, _ in steps}) == len(steps) > 25, "a file is visited twice"
    llm = Llama4.from_pretrained("tiny", progress=False)
    homes = {"llama4": Path(llama4.__file__).parent, "vision": Path(llama4.vision.__file__).parent}
    files = {str(homes[file.partition("/")[0]] / file.partition("/")[2]): file for file, _ in steps}
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = files.get(frame.f_code.co_filename)
        if event == "call" and (step := (file or "", frame.f_code.co_name)) in steps and step not in seen:
            seen.append(step)

    picture = {"type": "image", "image": ROOT / "examples/shapes.png"}
    sys.setprofile(note)
    try:
        llm.chat([{"role": "user", "content": [picture, {"type": "text", "text": "How many?"}]}], max_new_tokens=3)
    finally:
        sys.setprofile(None)
    assert seen == steps
