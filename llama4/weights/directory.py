"""Directories of models that are the old one until they are, in one step, the new one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from llama4.errors import CheckpointError, DiskError
from llama4.files import exchange, permissions, real_path, replaced_file, sync_directory, sync_file
from llama4.weights.locked_folder import clear, locked_folder

DOWNLOADS = "downloads"
"""Folder beside the temporary directory for files that are needed on the way; it is not part of the result."""
STEPS = "steps"
"""Folder beside it for what is computed before there is a file of the result; kept as these are."""
INSIDE = ".llama4-partial"
"""Folder to work in, in a directory beside which nothing can be written."""
_CONTENT = "content"
_KEPT = ("README.md",)
"""Files that stay in a directory that has them."""
_BROKEN_OFF = ".llama4-broken-off"
"""File in a directory whose files are being replaced one by one."""


@contextmanager
def complete_directory(
    directory: str | Path,
    *,
    must_be_free: bool = False,
    older: Collection[str] = (),
    keep: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """A temporary directory beside the target, which takes its place when the block ends well.

    Until then the target is what it was. What else a user has in it goes along. One process or thread at a time writes
    a target; another one waits, or, if the target must be free, is refused. What a killed one left is cleared away.

    Args:
        directory: the target. If it is a link, that stays one.
        must_be_free: the target must not hold anything.
        older: patterns of the files of an older model, which do not go along.
        keep: if the block does not end well, the temporary directory stays, and the next one gets the files of it for
            which this is true.

    Raises:
        DiskError: the directory cannot be written, or the disk is full.
        OSError: of the block, of another file.
        CheckpointError: it is in use, or another process writes it.
    """
    target = real_path(directory)
    work = work_of(target)
    content = work / _CONTENT
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(work, f"writing {target}", wait=not must_be_free):
            if must_be_free:
                _check_free(target)
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
            _begin(content, keep)
            done = False
            try:
                yield content
                _publish(content, target, older)
                done = True
            finally:
                if done or keep is None or not any(map(_has_files, (content, work / STEPS))):
                    _remove(content, work / DOWNLOADS, work / STEPS)
    except OSError as error:
        if error.filename is not None and not _is_of(real_path(os.fsdecode(error.filename)), target, work):
            raise  # of what is read, say
        about = f"{error.strerror or error}"
        if error.filename is not None and Path(os.fsdecode(error.filename)) != target:
            about += f" ({Path(os.fsdecode(error.filename)).name})"
        kept = f". What is done stays in {work} for another try" if keep is not None and work.exists() else ""
        raise DiskError(
            f"could not write the model to {target}: {about}; free space or choose another directory{kept}",
            error,
        ) from error


def _is_of(path: Path, target: Path, work: Path) -> bool:
    """Whether a path is one of those that are made for a target."""
    return path in target.parents or path.is_relative_to(target) or path.is_relative_to(work)


@contextmanager
def scratch_directory(name: str) -> Iterator[Path]:
    """An empty directory below the system's temporary one, which goes when the block ends. What a killed process left
    of the same name goes first.

    Raises:
        DiskError: it cannot be made.
    """
    work = Path(tempfile.gettempdir()) / f"llama4-{os.geteuid()}-{name}"
    try:
        with locked_folder(work, f"using {work}", private=True):
            _begin(work / _CONTENT, None)
            try:
                yield work / _CONTENT
            finally:
                shutil.rmtree(work / _CONTENT, ignore_errors=True)
    except OSError as error:
        raise DiskError(
            f"could not write to {work}: {error.strerror or error}; free space, or set TMPDIR to another directory",
            error,
        ) from error


def work_of(directory: str | Path) -> Path:
    """The folder in which `complete_directory` works: beside the target, or in it where only that is on its disk or may
    be written."""
    target = real_path(directory)
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    return target / INSIDE if inside else target.with_name(f".{target.name}-partial")


def check_free(directory: str | Path) -> None:
    """For those who write there later. What a process left that was killed when all was done goes.

    Raises:
        CheckpointError: a directory that holds something, or a file, or another process writes it.
    """
    if (work := work_of(directory)).exists():
        with locked_folder(work, f"writing {directory}", wait=False):
            _check_free(directory)
    else:
        _check_free(directory)


def _check_free(directory: str | Path) -> None:
    target = real_path(directory)
    if target.is_dir():
        names = {path.name for path in target.iterdir()} - {work_of(target).name}
        if not names or _BROKEN_OFF in names:
            return
    if target.exists():
        raise CheckpointError(f"{directory} exists already; choose a new directory, or remove that one first")


def check_whole(directory: str | Path) -> None:
    """Raises:
    CheckpointError: the files in a directory are of two models, because a process was killed that replaced them.
    """
    if (Path(directory) / _BROKEN_OFF).exists():
        raise CheckpointError(
            f"{directory} holds parts of two models: writing it was broken off, where it could not be replaced in one "
            "step; write it again"
        )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _begin(content: Path, keep: Callable[[Path], bool] | None) -> None:
    """An empty directory, but for what is kept."""
    content.mkdir(exist_ok=True)
    for path in content.iterdir():
        if keep is None or not path.is_file() or not keep(path):
            clear(path)
    if keep is None:
        clear(content.with_name(DOWNLOADS))
        clear(content.with_name(STEPS))


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _publish(content: Path, target: Path, older: Collection[str]) -> None:
    for kept in _KEPT:
        if (target / kept).exists():
            (content / kept).unlink(missing_ok=True)
    names = [path.relative_to(content) for path in sorted(content.rglob("*")) if path.is_file()]
    for name in names:
        (content / name).chmod(permissions(target / name))
        sync_file(content / name)
    for folder in {content / name.parent for name in names}:
        sync_directory(folder)
    if not _replace_at_once(content, target, older):
        _replace_files(content, target, names, older)
    sync_directory(target)
    sync_directory(target.parent)


def _replace_at_once(content: Path, target: Path, older: Collection[str]) -> bool:
    """-> False if that cannot be done here, and the target is as it was."""
    if not target.exists():
        content.rename(target)
        return True
    if content.is_relative_to(target) or os.path.ismount(target) or _is_used_by_us(target):
        return False
    try:
        shutil.copystat(target, content)
        _link_rest(target, content, older)
        exchange(content, target)
    except OSError:
        return False
    with suppress(OSError):
        _link_rest(content, target, older)  # what came in the moment between the two
    return True


def _is_used_by_us(directory: Path) -> bool:
    """Whether the process is in a directory: it would stay in the old one."""
    try:
        return Path.cwd().is_relative_to(directory)
    except FileNotFoundError:
        return False


def _link_rest(old: Path, new: Path, older: Collection[str], below: Path = Path()) -> None:
    """Let a directory have, too, what else is in the one whose place it takes: the same files, under a second name.

    Raises:
        OSError: a file system that has no such names, or another's file.
    """
    for entry in sorted((old / below).iterdir()):
        name = below / entry.name
        if _is_older(name, older):
            continue
        place = new / name
        if entry.is_dir() and not entry.is_symlink():
            if os.path.ismount(entry):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(entry))
            if not place.exists():
                place.mkdir()
                shutil.copystat(entry, place)
            _link_rest(old, new, older, name)
        elif not os.path.lexists(place):
            os.link(entry, place, follow_symlinks=False)
    sync_directory(new / below)


def _replace_files(content: Path, target: Path, names: Collection[Path], older: Collection[str]) -> None:
    """One by one, after a file that tells our loader not to; config.json, which others want first, is the last."""
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
    (target / _BROKEN_OFF).touch()
    sync_directory(target)  # from here on nothing takes room on the disk
    for path in sorted(target.rglob("*")):
        if _is_older(path.relative_to(target), older) and path.name != _BROKEN_OFF:
            path.unlink()
    for name in sorted(names, key=lambda name: name.name in ("config.json", "params.json")):
        _move(content / name, target / name)
    for folder in {target / name.parent for name in names}:
        sync_directory(folder)
    (target / _BROKEN_OFF).unlink()


def _move(file: Path, place: Path) -> None:
    try:
        file.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with file.open("rb") as content, replaced_file(place) as copy:
            shutil.copyfileobj(content, copy, 1 << 20)


def _is_older(name: Path, patterns: Collection[str]) -> bool:
    own = (_BROKEN_OFF, *patterns)
    return any(name.as_posix().count("/") == p.count("/") and fnmatchcase(name.as_posix(), p) for p in own)
