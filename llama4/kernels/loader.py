"""The compiled kernels for a CPU: the best of those libraries that kernels/build.py made and that this CPU runs.

Without one, or with `LLAMA4_CPU_KERNELS=off`, everything runs through torch, slower. `LLAMA4_CPU=avx2` takes another
level than the best. Nothing is compiled here, and a library that is not the one that was built is not loaded.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama4.errors import ArgumentError
from llama4.kernels import abi, build

logger = logging.getLogger(__name__)

SWITCH = "LLAMA4_CPU_KERNELS"
"""Environment variable; "off" keeps to torch."""
LEVEL = "LLAMA4_CPU"
"""Environment variable: the level to take, one of `build.LEVELS`."""
BUILD = "in a checkout `python -m llama4.kernels.build` builds them, elsewhere `pip install` does, with a C++ compiler"


class Found(NamedTuple):
    """What there is.

    Attributes:
        library: None where torch serves.
        level: of the library, or "".
        why: this one, or none.
        compiler: that built it.
        directory: where the libraries are.
        built: all levels that were built.
        problems: level -> why it was not built; "" for all.
    """

    library: abi.Library | None
    level: str
    why: str
    compiler: str = ""
    directory: str = ""
    built: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()


class _UnusableError(Exception):
    """Why no library is loaded."""


class _UnusableLevelError(Exception):
    """Why a level is not taken that adds to another, which is."""


_lock = threading.Lock()
_found: Found | None = None


def found() -> Found:
    """The kernels that this process uses. Why there are none is logged once, unless they are switched off.

    Raises:
        ArgumentError: `LLAMA4_CPU` names a level that is unknown, that this CPU does not run, or that was not built.
    """
    global _found
    if not _found:
        with _lock:
            _found = _found or _find(build.found_directory())
    return _found


def library() -> abi.Library | None:
    """The compiled kernels; None where torch serves.

    Raises:
        ArgumentError: as `found` does.
    """
    return found().library


def loaded() -> abi.Library:
    """The same where it is known that there are kernels."""
    library = found().library
    assert library is not None
    return library


def function(name: str, dtype: torch.dtype) -> Callable[..., bytes | None]:
    """The kernel of that name, one of `abi.SIGNATURES`, for rows of a dtype; its result is for `abi.check`."""
    return loaded().functions[name, dtype]


def _find(directory: Path) -> Found:
    if os.environ.get(SWITCH, "").lower() == "off":
        return Found(None, "", f"{SWITCH}=off")
    forced = os.environ.get(LEVEL, "").lower()
    usable = build.runs(build.cpu_features())
    if forced:
        _check_level(forced, usable)
    nothing = Found(None, "", "", directory=str(directory))
    try:
        manifest = _manifest(directory)
        levels = manifest["levels"]
        nothing = nothing._replace(built=(*levels,), problems=(*manifest["problems"].items(),))
        level = forced or _best(manifest, usable)
        if level not in levels:
            built = ", ".join(levels) or "none"
            raise ArgumentError(f"{LEVEL}={forced}: this level was not built (built: {built}); {BUILD}")
        why = f"{LEVEL}={forced}" if forced else "the best that was built and that this CPU runs"
        try:
            library = _load(directory, levels, level)
        except _UnusableLevelError as error:
            if forced:
                raise ArgumentError(f"{LEVEL}={forced}: {error}") from None
            why = f"{why} but {level}: {error}"
            level = _best(manifest, [name for name in usable if name != level])
            logger.warning("the CPU kernels are those of %s: %s. %s=%s silences this", level, why, LEVEL, level)
            library = _load(directory, levels, level)
        return nothing._replace(library=library, level=level, compiler=levels[level]["compiler"], why=why)
    except _UnusableError as error:
        logger.warning("the CPU kernels are not used, which is slower: %s. %s=off silences this", error, SWITCH)
        return nothing._replace(why=str(error))


def _check_level(level: str, usable: list[str]) -> None:
    levels = build.LEVELS.get(build.machine(), {})
    if level not in levels:
        raise ArgumentError(
            f"{LEVEL}={level}: there is no such level on {build.machine()}; {', '.join(levels) or 'none'}"
        )
    if level not in usable:
        missing = ", ".join(sorted(levels[level].features - build.cpu_features()))
        raise ArgumentError(f"{LEVEL}={level}: this CPU lacks {missing}; it runs {', '.join(usable) or 'no level'}")


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / build.MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        told = [type(manifest[name]) for name in ("sources", "levels", "problems")]
        entries = manifest["levels"].values()
        if told != [str, dict, dict] or not all({"file", "sha256", "compiler"} <= {*entry} for entry in entries):
            raise TypeError("it is not a manifest")
    except FileNotFoundError:
        raise _UnusableError(f"they were not built, {path} is not there; {BUILD}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _UnusableError(f"{path} is damaged ({error}); {BUILD}") from None
    if manifest["sources"] != build.sources_hash():
        raise _UnusableError(f"{directory} was built from other sources than those in {build.SOURCES}; {BUILD}")
    return manifest


def _best(manifest: dict[str, Any], usable: list[str]) -> str:
    best = [level for level in usable if level in manifest["levels"]]
    if best:
        return best[-1]
    problems = [f"{level}: {problem}" if level else problem for level, problem in manifest["problems"].items()]
    if not problems and not usable:
        problems = [f"this CPU runs none of {', '.join(manifest['levels'])}"]
    raise _UnusableError(f"{'; '.join(problems) or 'no level for this CPU was built'}; {BUILD}")


def _load(directory: Path, levels: dict[str, Any], level: str) -> abi.Library:
    base = build.LEVELS[build.machine()][level].base
    if base and base not in levels:
        raise _UnusableLevelError(f"it needs {base}, which was not built; {BUILD}")
    entry = levels[base or level]
    library = _open(directory, entry)
    try:
        bound = abi.bind(library)
    except (AttributeError, abi.AbiError) as error:
        raise _UnusableError(f"{directory / entry['file']} cannot be used ({error}); {BUILD}") from None
    if base:
        try:
            abi.add_amx(library, _open(directory, levels[level]))
        except (_UnusableError, abi.AbiError) as error:
            raise _UnusableLevelError(str(error)) from None
    return bound


def _open(directory: Path, entry: dict[str, Any]) -> ctypes.CDLL:
    """Only if it is what was built: a truncated file would end the process, a foreign one could do anything."""
    path = directory / entry["file"]
    try:
        if build.file_hash(path) != entry["sha256"]:
            raise _UnusableError(f"{path} is damaged, or not the file that was built; {BUILD}")
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _UnusableError(f"{path} cannot be used ({error}); {BUILD}") from None
