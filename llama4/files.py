"""Files that are complete under their final name or not there at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llama4.progress import PIECE, each

_SYNC = 256 << 20
"""Bytes after which a file that is being written is synced: at once, at its end, that may take a minute."""


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends well: others see the old content or the new,
    whole. Two that write at once do not meet; the later one stays. Where a reader has mapped the old file, it keeps it.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    path = path.resolve()  # a link stays one
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), permissions(path))
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_pieces(file: BinaryIO, data: memoryview) -> None:
    """Write bytes a piece at a time, so that progress is seen and Ctrl-C is answered.

    Raises:
        OSError: they cannot be written.
    """
    for at in each(range(0, len(data), PIECE)):
        end = file.tell() + file.write(data[at : at + PIECE])
        if end % _SYNC < PIECE <= end:
            file.flush()
            os.fsync(file.fileno())


def permissions(path: Path) -> int:
    """Those of a file that is there, else what the user's umask leaves of a new one."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return 0o666 & ~_umask()


def sync_directory(directory: Path) -> None:
    """Make the names in a directory last through a power failure, where the file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _umask() -> int:
    # Setting the umask to read it would change it for other threads.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
