"""Metrics to where people look at many runs: TensorBoard and Weights & Biases, each through its own package.

A new one is a class of this file and a place in `TRACKERS`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from llama4.errors import ArgumentError, Llama4Error

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
"""Of a run's output; `tensorboard --logdir` finds it."""
PROJECT = "llama4"
"""At Weights & Biases, unless WANDB_PROJECT says another."""


class Tracker(Protocol):
    """Gets what `metrics.jsonl` gets, under the same names."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None:
        """Send or write what is left."""


class TensorBoard:
    """Event files in the output."""

    def __init__(self, output: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what was written beyond the step that a run goes on from is not shown
        self._writer: Any = SummaryWriter(str(output / TENSORBOARD_FOLDER), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run there; one that is resumed is another of the same group. WANDB_MODE=offline keeps it in the output."""

    def __init__(self, output: Path, settings: Mapping[str, Any], step: int) -> None:
        import wandb

        output.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run: Any = wandb.init(project=project, group=output.name, dir=str(output), config=dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""By the name of the package."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises:
    ArgumentError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ArgumentError(f"report_to is {name!r}; choose of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise ArgumentError(f"report_to {name!r} needs its package, which is not here: pip install {name}")


@contextmanager
def tracking(names: Sequence[str], output: Path, settings: Mapping[str, Any], step: int) -> Iterator[list[Tracker]]:
    """Those that were asked for; closed at the end, whatever it is.

    Args:
        settings: of the run, to be shown beside it.
        step: that it goes on from, or 0.

    Raises:
        Llama4Error: one does not start, and why.
    """
    started: list[Tracker] = []
    try:
        for name in names:
            try:
                started.append(TRACKERS[name](output, settings, step))
            except Exception as error:  # of a stranger's package: no key, no network, built for another torch
                raise Llama4Error(f"report_to {name!r} does not start: {error}") from error
        yield started
    finally:
        for tracker in started:
            try:
                tracker.close()
            except Exception as error:  # no reason to lose what was learnt, nor to leave the others open
                logger.warning("report_to: %s did not end well: %s", type(tracker).__name__, error)
