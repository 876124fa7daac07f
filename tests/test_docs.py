"""CONTRIBUTING names files and tests; they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_files_of_the_tour_exist() -> None:
    files = re.findall(r"^\| `((?:llama4|vision)/[\w/]+\.py)`", TEXT, re.MULTILINE)
    assert len(files) > 12
    assert all((ROOT / file).is_file() for file in files)


def test_tests_of_every_line_exist() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and "test_" in line]
    assert len(rows) > 25
    for row in rows:
        file = ""
        for cited in re.findall(r"`([\w/]*\.py)?(?:::(\w+))?`", row):
            file = cited[0] or file
            path = ROOT / "tests" / file
            assert path.is_file(), row
            if cited[1]:
                assert re.search(rf"^ *(def|class) {cited[1]}\b", path.read_text(), re.MULTILINE), cited
