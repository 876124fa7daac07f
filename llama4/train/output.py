"""The directory of a run: one run at a time writes there, and nothing of others is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llama4.adapters.files import WEIGHTS_FILE
from llama4.errors import ArgumentError, CheckpointError
from llama4.files import writes
from llama4.train.report import METRICS_FILE, is_finished
from llama4.train.state import STATE_FILE
from llama4.weights.checkpoint import LAYOUTS
from llama4.weights.locked_folder import locked_folder

LOCKED = ".llama4-training"
"""Folder in the output while a run writes there."""


def check_output(output: Path, resume: bool) -> None:
    """For those who train there later, as far as that can be told before anything is loaded.

    Raises:
        CheckpointError: there is a model or an adapter that no run has written, perhaps the one that shall be trained;
            or another run is at work there.
        ArgumentError: the run that shall be resumed is finished.
        DiskError: the directory cannot be written.
    """
    if not any((output / name).exists() for name in (METRICS_FILE, STATE_FILE)):
        is_adapter = (output / WEIGHTS_FILE).exists()
        patterns = (pattern for layout in LAYOUTS.values() for pattern in layout.weight_files)
        if is_adapter or any(any(output.glob(pattern)) for pattern in patterns):
            kind = "an adapter" if is_adapter else "a model"
            raise CheckpointError(f"{output} holds {kind} that no run has written; choose another directory")
    if (output / LOCKED).exists() or (resume and is_finished(output)):
        with alone_in(output, resume):
            pass


@contextmanager
def alone_in(output: Path, resume: bool) -> Iterator[None]:
    """Inside, no other process or thread trains into a directory, and there is something to do.

    Raises:
        CheckpointError: another run is at work there.
        ArgumentError: the run that shall be resumed is finished.
        DiskError: the directory cannot be made.
    """
    with ExitStack() as stack:
        with writes(output / LOCKED):
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_folder(output / LOCKED, f"training {output}", wait=False))
        if resume and is_finished(output):
            (output / STATE_FILE).unlink(missing_ok=True)  # the process was killed just before
            raise ArgumentError(f"the run in {output} is finished; there is nothing to resume")
        yield
