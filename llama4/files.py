"""Files and directories that are complete under their final name or not there at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llama4.errors import ArgumentError, DiskError
from llama4.progress import PIECE, track

_SYNC = 256 << 20
"""Bytes after which a file that is being written is synced: at once, at its end, that may take a minute."""


def user_path(name: str | Path) -> Path:
    """A path as users write it: ~ is their home.

    Raises:
        ArgumentError: ~NAME of a user who is not there, or characters that no name has.
    """
    try:
        if b"\0" in os.fsencode(name):
            raise ArgumentError(f"{str(name)!r} is no name of a file: it has a NUL")
        return Path(name).expanduser()
    except UnicodeEncodeError:
        raise ArgumentError(f"{str(name)!r} is no name of a file: it has half of a surrogate pair") from None
    except RuntimeError:
        raise ArgumentError(f"{name} cannot be found: no such user has a home here; write the whole path") from None


def real_path(path: str | Path) -> Path:
    """A whole path without links, whether it is there or not.

    Raises:
        OSError: a circle of links.
    """
    real = os.path.realpath(path)
    if os.path.islink(real):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return Path(real)


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends well: others see the old content or the new,
    whole. Two that write at once do not meet; the later one stays. Where a reader has mapped the old file, it keeps it.
    What a killed process left of the same file is deleted.

    Raises:
        DiskError: it cannot be written; `path` is as it was.
        OSError: of the block, of another file.
    """
    with writes(path):
        path = real_path(path)  # a link stays one
        _delete_leftovers(path)
        descriptor, partial = _temporary_file(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), permissions(path))
                os.fsync(file.fileno())
                partial.replace(path)  # while it is locked: another process takes it for no leftover
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """What the system says of a file that is written, as users are told it.

    Raises:
        DiskError: it cannot be written.
        OSError: of the block, of another file.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskError) or (error.filename is not None and not _is_of(error.filename, path)):
            raise
        raise DiskError(
            f"could not write {path}: {error.strerror or error}; free space or choose another place", error
        ) from error


def _is_of(name: str | bytes, path: Path) -> bool:
    """Whether a file is one that is made for `path`: itself, its directories, or a temporary one."""
    about, path = (Path(os.path.realpath(each)) for each in (os.fsdecode(name), path))
    if about == path or about in path.parents:
        return True
    return about.is_relative_to(path.parent) and about.relative_to(path.parent).parts[0].startswith(f".{path.name}-")


def write_pieces(file: BinaryIO, data: memoryview) -> None:
    """Write bytes a piece at a time, so that progress is seen and Ctrl-C is answered.

    Raises:
        OSError: they cannot be written.
    """
    for at in track(range(0, len(data), PIECE)):
        end = file.tell() + file.write(data[at : at + PIECE])
        if end % _SYNC < PIECE <= end:
            file.flush()
            os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file as `replaced_file` does.

    Raises:
        DiskError: it cannot be written; `path` is as it was.
    """
    with replaced_file(path) as file:
        file.write(text.encode("utf-8"))


def permissions(path: Path) -> int:
    """Those of a file that is there, else what the user's umask leaves of a new one."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return 0o666 & ~_umask()


def sync_file(path: Path) -> None:
    """Make a file's content last through a power failure.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def exchange(one: Path, other: Path) -> None:
    """Let two files or directories of one file system change names, in one step.

    Raises:
        OSError: the system, or the file system, cannot.
    """
    names = os.fsencode(one), os.fsencode(other)
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], 2)  # RENAME_EXCHANGE
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def try_lock(descriptor: int) -> bool:
    """Lock a file against other processes and threads until it is closed; -> False if another one has.

    Raises:
        OSError: the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _temporary_file(path: Path) -> tuple[int, Path]:
    """Beside a file, and locked."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        is_ours = True
        with suppress(OSError):  # where there are no locks
            is_ours = try_lock(descriptor)
        if is_ours and is_named(descriptor, Path(name)):
            return descriptor, Path(name)
        os.close(descriptor)  # before it was locked it was taken for a leftover, and is deleted


def _delete_leftovers(path: Path) -> None:
    """Temporary files that nobody has locked."""
    name = re.compile(re.escape(f".{path.name}-") + "[a-z0-9_]{8}")  # tempfile's
    for found in path.parent.glob(f".{glob.escape(path.name)}-*"):
        if name.fullmatch(found.name):
            with suppress(OSError):  # gone, another user's, or where there are no locks
                _delete_unlocked(found)


def _delete_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if try_lock(descriptor):
            path.unlink()
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
