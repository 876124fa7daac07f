"""Directories that are complete under their final name or not there at all."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama4.errors import CheckpointError

DOWNLOADS = "downloads"
"""Folder of a temporary directory for files that are needed on the way; it is not part of the result."""
_STAMP = "stamp.txt"
_KEPT = ("README.md",)
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|consolidated\.\d\d\.pth")


@contextmanager
def complete_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory beside the target, which takes its place when the block ends well.

    A new target appears at once, complete; in one that has content already, files are replaced one by one, others are
    left alone (so is a model card that is there), and weights of an older model are removed last.

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full.
    """
    directory = Path(directory).resolve()
    partial: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-partial-", dir=directory.parent))
        partial.chmod(0o755)
        yield partial
        _move(partial, directory)
    except OSError as error:
        raise CheckpointError(
            f"could not write the model to {directory}: {error.strerror or error}; free space or choose "
            "another directory"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumed_directory(directory: str | Path, stamp: str) -> Iterator[Path]:
    """As `complete_directory`; but if the block does not end well the temporary directory stays, and the next block
    with the same stamp gets it as it is.

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full; or another process writes it.
    """
    directory, partial = Path(directory).resolve(), partial_of(directory)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        note = partial / _STAMP
        if not note.is_file() or note.read_text(encoding="utf-8") != stamp:
            shutil.rmtree(partial)
            partial.mkdir()
            note.write_text(stamp, encoding="utf-8")
        with note.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another process is writing {directory}; wait for it, or stop it") from None
            yield partial
            shutil.rmtree(partial / DOWNLOADS, ignore_errors=True)
            note.unlink()
            _move(partial, directory)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"could not write the model to {directory}: {error.strerror or error}; free space or choose another "
            f"directory. What is done stays in {partial} for another try"
        ) from error


def partial_of(directory: str | Path) -> Path:
    """The temporary directory of `resumed_directory`."""
    directory = Path(directory).resolve()
    return directory.with_name(f".{directory.name}-partial")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move(partial: Path, directory: Path) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        partial.replace(directory)  # rename(2) takes the place of an empty directory
        return
    new = {path.name for path in partial.iterdir()}
    for name in sorted(new):
        if name not in _KEPT or not (directory / name).exists():
            os.replace(partial / name, directory / name)
    for path in directory.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in new:
            path.unlink()
