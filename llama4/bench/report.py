"""Samples -> medians with their range, tables for a terminal or a page, and the options that all benchmarks share."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from llama4.bench.peak_rates import PeakRates
from llama4.errors import ArgumentError
from llama4.progress import Bar

T = TypeVar("T")
DISTURBED = 0.05
"""Share of the cores used by other processes from which measurements suffer."""


@dataclass(frozen=True)
class Spread:
    """The median of several samples, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], scale: float = 1.0) -> Spread:
        """What `summary` gave, in other units."""
        return cls(content["median"] * scale, content["low"] * scale, content["high"] * scale)

    def __str__(self) -> str:
        middle, low, high = number(self.median), number(self.low), number(self.high)
        return middle if low == high else f"{middle} ({low}-{high})"


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """The samples and their spread, ready for JSON."""
    return {"samples": list(samples), **asdict(Spread.of(samples))}


def rates_json(rates: Sequence[PeakRates]) -> dict[str, Any]:
    """Peak rates that were measured, ready for JSON: bytes and FLOP per second."""
    return {"memory": summary([rate.memory for rate in rates]), "gemm": summary([rate.gemm for rate in rates])}


def rates_line(rates: Mapping[str, Any]) -> str:
    """`rates_json` as a line of text."""
    memory, gemm = (Spread.from_json(rates[kind], 1e-9) for kind in ("memory", "gemm"))
    return f"measured peak: memory read {memory} GB/s, matrix product {gemm} GFLOP/s"


def machine_line(machine: Mapping[str, Any]) -> str:
    """`machine.describe` as a piece of a line."""
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}, torch {machine['torch']}"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{value:,.{max(digits, 0)}f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = False) -> str:
    """Lines of text: the first column to the left, all others to the right."""
    lines = [list(heads), *(list(row) for row in rows)]
    if markdown:
        rule = ["---", *["--:"] * (len(heads) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    first = [line[0].ljust(widths[0]) for line in lines]
    return "\n".join("   ".join([head, *line[1:]]).rstrip() for head, line in zip(first, padded, strict=True))


def shown(items: Sequence[T], name: Callable[[T], object] = str) -> Iterator[T]:
    """The items, with a progress bar that names the current one; where nobody sees that, with a line now and then."""
    with Bar("measuring", len(items), "steps", logged=True) as bar:
        for item in items:
            bar.describe(f"measuring {name(item)}")
            with bar.step(1):
                yield item


def warn(text: str) -> None:
    print(f"llama4: {text}", file=sys.stderr)


def warn_of_other_processes(shares: Sequence[float | None], stolen: float | None = None) -> None:
    """A warning if other processes, or other guests of a virtual machine's host, used so much that measurements
    suffer."""
    known = [share for share in shares if share is not None]
    if not known or (worst := max(known)) < DISTURBED:
        return
    disturbed = sum(share >= DISTURBED for share in known)
    how_often = f" during {disturbed} of {len(known)} samples" if len(known) > 1 else ""
    of_these = f"; the host took {stolen:.0%}" if stolen is not None and stolen >= 0.005 else ""
    load = f"; load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    warn(
        f"the machine was busy{how_often}: other processes used up to {worst:.0%} of the cores{of_these}{load}, which "
        "makes the figures worse"
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print everything, single samples too, as JSON")
    output.add_argument("--markdown", action="store_true", help="print tables for a page")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N")


def whole(text: str, least: int = 0) -> int:
    """For argparse.

    Raises:
        ArgumentError: no whole number, or one below `least`.
    """
    if not text.isdecimal() or int(text) < least:
        raise ArgumentError(f"{text!r:.40} is no whole number, {least} or more")
    return int(text)


def positive(text: str) -> int:
    """`whole`, from 1."""
    return whole(text, 1)
