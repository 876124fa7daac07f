"""Runs the commands that stand in docs/performance.md, and puts what they print below each.

    python docs/measure.py DIRECTORY [WORD ...]

DIRECTORY holds the models, by the names that the commands have. With words, only commands that have one of them run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import draw_performance

PAGE = Path(__file__).with_name("performance.md")
BLOCK = re.compile(
    r"```\nllama4 (?P<command>bench [^\n]*)\n```\n\n<!-- measured -->\n(?P<output>.*?)<!-- end -->", re.DOTALL
)


def run(command: str, directory: str) -> str:
    """What a command prints; it sees the models, and this checkout."""
    arguments = shlex.split(command.replace("performance.json", str(draw_performance.RESULTS)))
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[1])}
    print(f"llama4 {command}", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "llama4", *arguments],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def main(directory: str, words: Sequence[str] = ()) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for block in BLOCK.finditer(page):
        command = block["command"]
        if not words or set(words) & set(shlex.split(command)):
            new = block[0].replace(
                f"<!-- measured -->\n{block['output']}", f"<!-- measured -->\n{run(command, directory)}"
            )
            page = page.replace(block[0], new)
            PAGE.write_text(page, encoding="utf-8")
    if draw_performance.RESULTS.exists():
        draw_performance.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
