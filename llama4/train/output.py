"""The directory of a run: one run writes there, one process at a time, and replaces nothing of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llama4.adapters.files import WEIGHTS_FILE
from llama4.errors import ArgumentError, CheckpointError
from llama4.files import writes
from llama4.train.report import is_finished
from llama4.train.state import STATE_FILE
from llama4.weights.checkpoint import LAYOUTS
from llama4.weights.locked_folder import locked_folder

LOCKED = ".llama4-training"
"""Folder in the output while a run writes there."""


def check_output(output: Path, resume: bool) -> None:
    """For those who train there later, as far as that can be told before anything is loaded.

    Raises:
        CheckpointError: there is a model or an adapter, perhaps the one that shall be trained; or another run is at
            work there.
        ArgumentError: there is a run, and it is finished, or shall not be resumed; or a file.
        DiskError: the directory cannot be written.
    """
    if (output / LOCKED).exists():
        with alone_in(output, resume):
            return
    _check(output, resume)


@contextmanager
def alone_in(output: Path, resume: bool) -> Iterator[None]:
    """Inside, no other process or thread trains into a directory, and nothing is there but the run that is resumed.

    Raises:
        CheckpointError, ArgumentError: see `check_output`.
        DiskError: the directory cannot be made.
    """
    with ExitStack() as stack:
        with writes(output / LOCKED):
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_folder(output / LOCKED, f"training {output}", wait=False))
        if is_finished(output):
            (output / STATE_FILE).unlink(missing_ok=True)  # the process was killed just before
        _check(output, resume)
        yield


def _check(output: Path, resume: bool) -> None:
    other = "choose another directory, or remove that one first"
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"{output} is a file, and a run writes into a directory; choose another name")
    if is_finished(output):
        if resume:
            raise ArgumentError(f"the run in {output} is finished; there is nothing to resume")
        raise ArgumentError(f"{output} holds a finished run; {other}")
    if (output / STATE_FILE).exists():
        if resume:
            return
        raise ArgumentError(f"{output} holds a run that was stopped; resume it, or {other}")
    patterns = (pattern for layout in LAYOUTS.values() for pattern in layout.weight_files)
    is_adapter = (output / WEIGHTS_FILE).exists()
    if is_adapter or any(any(output.glob(pattern)) for pattern in patterns):
        raise CheckpointError(f"{output} holds {'an adapter' if is_adapter else 'a model'} already; {other}")
