"""All that files, crashes and strangers may do: `python -m tests.faults [GROUP ...] [--sample N] [--tries N]` prints,
for every kind, how many were tried and how many failed. All of it takes the better part of an hour on two cores.

With `--save` the counts become those of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import damage, events, kills, limits
from tests.faults.tally import Tally

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "faults.json"
MEMORY = Path("/dev/shm")
"""A disk that is none, where files are synced at once."""
TESTS = {
    "pictures that ask for much": "vision/test_memory.py",
    "pictures from addresses": "vision/test_download.py",
    "saved prompt caches": "engine/test_prefix_cache.py",
    "arguments of C++": "kernels/test_abi.py",
    "panics of tokenizers": "faults/test_panics.py",
    "stored responses": "serve/test_store.py",
    "two writers, leftovers": "weights/test_directory.py",
    "forks": "test_forks.py",
    "waiting": "test_progress.py",
    "Ctrl-C": "test_interrupts.py",
}
"""Kind -> its tests."""


class _Reports:
    """What pytest says of each test."""

    def __init__(self, tally: Tally, kind: str) -> None:
        self.tally, self.kind = tally, kind

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or (report.when == "call" and report.passed):
            self.tally.note(self.kind, "it fails" if report.failed else None, report.nodeid)


def run_tests() -> Tally:
    tally = Tally()
    for kind, file in TESTS.items():
        options = ["-n", "0", "-q", "--no-header", "-p", "no:cacheprovider"]
        pytest.main([str(ROOT / "tests" / file), *options], plugins=[_Reports(tally, kind)])
    return tally


def main() -> int:
    def in_folder(run: Callable[[Path], Tally]) -> Tally:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
            return run(Path(name).resolve())

    groups: dict[str, tuple[str, Callable[[], Tally]]] = {
        "writers": (
            "Writers, ended at an event of their files: killed, cut off from power, on a full disk",
            lambda: (
                in_folder(lambda folder: kills.run_in_parts(folder, options.sample, options.jobs))
                if events.is_supported()
                else Tally()
            ),
        ),
        "damage": ("Damaged files", lambda: in_folder(lambda folder: damage.run(options.tries, 0, folder))),
        "limits": ("Absurd files, by five commands", lambda: in_folder(limits.run)),
        "tests": ("Tests", run_tests),
    }
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups)} (default: all)")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="events of each writer at which it is ended (default: all)"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that try writers (default: 2)")
    parser.add_argument("--tries", type=int, default=100, metavar="N", help="damaged files of each kind (default: 100)")
    parser.add_argument("--save", action="store_true", help="show the counts in docs/reliability.md")
    parser.add_argument("--version", default="", metavar="COMMIT", help="what is tried, for the page")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(groups):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    failed = False
    for name in options.groups or groups:
        title, run = groups[name]
        print(title, flush=True)
        tally = run()
        print(tally, flush=True)
        failed |= bool(tally.failed)
        if options.save:
            save(name, title, options.version, tally, list(groups))
    return 1 if failed else 0


def save(group: str, title: str, version: str, tally: Tally, order: list[str]) -> None:
    """Store the counts of a group, and render the page."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    counts = {kind: [tally.tried[kind], tally.failed[kind]] for kind in tally.tried}
    results[group] = {"title": title, "date": str(datetime.date.today()), "version": version, "counts": counts}
    results = {name: results[name] for name in order if name in results}
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(results, indent=1))
    RESULTS.write_text(f"{text}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # tests set it
    subprocess.run([sys.executable, str(ROOT / "docs/figures.py")], check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
