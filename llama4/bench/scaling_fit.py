"""The cost of context: time fitted as a constant, plus the work of chunked layers, plus that of full layers.

Each kind of layer has a rate of its own. A decoding step reads keys and values, a piece of a prompt multiplies with
them. In the fit the cost of chunked layers can only grow within a chunk, so its largest error tells whether they stay
flat beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llama4.bench import roofline
from llama4.config import TextConfig


@dataclass
class Point:
    """At a position: the seconds of prefilling the piece that begins there, or of one decoding step (the median)."""

    position: int
    tokens: int
    seconds: float


@dataclass
class Fit:
    """seconds = constant + chunked work / chunked_rate + full work / full_rate.

    Rates are in bytes or FLOP per second: equal where the points cannot tell the two kinds apart, None where time does
    not grow with work.
    """

    constant: float
    chunked_rate: float | None
    full_rate: float | None
    largest_error: float
    """Of the points, relative."""


def keys_by_kind(text: TextConfig, position: int, tokens: int) -> tuple[int, int]:
    """Keys that these tokens see in all chunked layers, and in all full layers."""
    kinds = [0, 0]
    for layer in range(text.num_hidden_layers):
        kinds[text.window(layer) is None] += roofline.keys_seen(text, layer, range(position, position + tokens))
    return kinds[0], kinds[1]


def fit(points: Sequence[Point], keys: Callable[[Point], tuple[int, int]], per_key: int) -> Fit | None:
    """By least squares of relative errors; None with fewer points than unknowns.

    `keys` gives the keys in chunked layers and in full ones, `per_key` the bytes or FLOP of one.
    """
    work = torch.tensor([keys(point) for point in points], dtype=torch.float64).reshape(-1, 2) * per_key
    spent = torch.tensor([point.seconds for point in points], dtype=torch.float64)
    separable = len(points) > 0 and _differ(work)
    work = work if separable else work.sum(1, keepdim=True)
    if len(points) < work.shape[1] + 2:
        return None
    scale = work.amax(0).clamp(min=1)
    unknowns = torch.cat([torch.ones(len(points), 1, dtype=torch.float64), work / scale], dim=1)
    weights = 1 / spent  # relative errors
    solution = torch.linalg.lstsq(unknowns * weights[:, None], (spent * weights)[:, None]).solution[:, 0]
    errors = (unknowns @ solution - spent).abs() / spent
    slopes = (solution[1:] / scale).tolist()
    chunked, full = (1 / slope if slope > 0 else None for slope in (slopes[0], slopes[-1]))
    return Fit(solution[0].item(), chunked, full, errors.max().item())


def _differ(work: torch.Tensor) -> bool:
    """Whether there are layers of both kinds, whose work differs from point to point and between the two."""
    shares = work / work.amax(0).clamp(min=1)
    both = torch.cat([shares, shares[:, :1] - shares[:, 1:]], dim=1)
    return bool(work.any(0).all()) and bool((both.amax(0) - both.amin(0)).min() > 0.2)
