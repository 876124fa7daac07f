"""Samples -> medians with their spread, and tables for a terminal or a page."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
DISTURBED = 0.05
"""Share of the cores in other hands from which figures suffer."""


@dataclass(frozen=True)
class Spread:
    """Of several samples the median, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples))

    def __str__(self) -> str:
        middle, low, high = number(self.median), number(self.low), number(self.high)
        return middle if low == high else f"{middle} ({low}-{high})"


def number(value: float) -> str:
    """Three digits that count, and no exponent."""
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
    """The items, with a bar on a terminal that says which one is at work."""
    with tqdm(total=len(items), leave=False, disable=not sys.stderr.isatty()) as bar:
        for item in items:
            bar.set_description(str(name(item)))
            yield item
            bar.update()


def warn(text: str) -> None:
    print(f"llama4: {text}", file=sys.stderr)


def warn_of_others(shares: Sequence[float | None]) -> None:
    """Says if others have taken so much that figures suffer."""
    known = [share for share in shares if share is not None]
    if known and (worst := max(known)) >= DISTURBED:
        warn(f"other processes took up to {worst:.0%} of the cores meanwhile; the figures are lower for it")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print everything, single samples too, as JSON")
    output.add_argument("--markdown", action="store_true", help="print tables for a page")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N")


def positive(text: str) -> int:
    """For argparse: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value
