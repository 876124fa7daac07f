"""A folder to work in, which one process or thread has at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama4.errors import CheckpointError
from llama4.files import is_named, try_lock

logger = logging.getLogger(__name__)

_LOCK = "lock"
_PATIENCE = 1.0
"""Seconds to wait in silence."""


@contextmanager
def locked_folder(folder: Path, what: str, *, wait: bool = True, private: bool = False) -> Iterator[None]:
    """Make a folder and hold it. It goes in the end if nothing is left in it. What is left is there for the next one
    who asks for the same folder: a process that was killed leaves all that it had, and its lock goes with it.

    Args:
        folder: its name says what for, so that two who want the same meet there.
        what: is done, for messages: "writing /models/scout".
        wait: for another one who is at work in it, which is said after a second; else that is an error.
        private: where everyone may make folders: only the user can look into it.

    Raises:
        CheckpointError: another one is at work, or the folder is there and not one of these.
        OSError: it cannot be made.
    """
    descriptor = _held(folder, what, wait, private)
    lock = folder / _LOCK
    try:
        with suppress(OSError):  # a full disk will be noticed by those who write more
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [_LOCK]:
                lock.unlink()  # who waits for it sees that it has no name any more, and begins anew
                folder.rmdir()
        with suppress(OSError):  # a process that was forked meanwhile has it open, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def clear(path: Path) -> None:
    """Delete a file or a directory, if it is there.

    Raises:
        OSError: some of it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _held(folder: Path, what: str, wait: bool, private: bool) -> int:
    """The folder's lock, open."""
    lock, begin, said = folder / _LOCK, time.monotonic(), False
    while True:
        with suppress(FileExistsError):
            folder.mkdir(0o700 if private else 0o777)
        with suppress(FileNotFoundError):  # both may be gone again: the one before is done
            names, is_others = os.listdir(folder), private and folder.lstat().st_uid != os.geteuid()
            if folder.is_symlink() or is_others or (names and _LOCK not in names):
                raise CheckpointError(f"{folder} is in the way of {what}, and not of this library; rename or remove it")
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError:
                with suppress(OSError):
                    folder.rmdir()  # if nobody has anything in it
                raise
            try:
                held = try_lock(descriptor)
            except OSError as error:
                logger.warning("%s cannot be locked (%s): let only one process at a time write there", lock, error)
                held = True
            if held and is_named(descriptor, lock):
                return descriptor
            owner = _owner(descriptor)
            os.close(descriptor)
            if held:
                continue
            if not wait:
                raise CheckpointError(f"{owner} is {what}; wait for it, or stop it")
            if not said and time.monotonic() - begin > _PATIENCE:
                logger.warning("waiting: %s is %s", owner, what)
                said = True
            time.sleep(0.05)


def _owner(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {about['pid']} on {about['host']}, at work since {about['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
