"""The tests that are marked `cuda`, if pytest is there."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llama4.bench.device.machine import ROOT
from llama4.bench.device.record import Figures, Record, Skip
from llama4.errors import Llama4Error

LIGHT = "test_experts.py"
"""Imports least; a dry run, which sees no more than that tests are found, takes it alone."""
SLOW = "scouts_size"
"""Names of tests that prepare much on the host; they come last."""


MARKS = ("pytest.mark.cuda", "@on_a_device")
"""How a file marks tests that need a GPU: by itself, or so that they also run in Triton's interpreter."""


class Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self.counts["failed"] += 1
            self.failed.append(f"{report.nodeid} (not collected)")


def run(record: Record) -> None:
    files = [file for file in _files() if not record.dry or file.name == LIGHT]
    for file in files:
        record.case(str(file.relative_to(ROOT)), partial(_pytest, file, f"not {SLOW}"))
    for file in files:
        if SLOW in file.read_text(encoding="utf-8"):
            record.case(f"{file.relative_to(ROOT)}: {SLOW}", partial(_pytest, file, SLOW))
    if not files:
        record.case("tests", partial(_skip, f"no tests stand beside the library in {ROOT}"))
    if find_spec("llama4.train") is None:
        record.case("a step of fine-tuning", partial(_skip, "llama4.train is not there"))


def _files() -> list[Path]:
    """Those marked one by one, then those of kernels, which compile for long."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    return [path for mark in MARKS for path, text in texts.items() if mark in text]


def _skip(reason: str) -> Figures:
    raise Skip(reason)


def _pytest(file: Path, names: str) -> Figures:
    try:
        import pytest
    except ImportError:
        raise Skip("pytest is not installed") from None
    outcomes = Outcomes()
    os.chdir(ROOT)
    options = ["-m", "cuda", "-k", names, "-v", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with torch.inference_mode(False):
        code = pytest.main([*options, str(file)], plugins=[outcomes])
    if outcomes.failed or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise Llama4Error(f"code {int(code)}, {outcomes.counts}: {'; '.join(dict.fromkeys(outcomes.failed))}")
    return outcomes.counts
