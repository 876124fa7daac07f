"""Builds the CPU kernels: a shared library for each level of instruction set, all from the same sources in `cpp/`.

    python llama4/kernels/build.py                  in a checkout, every level, into llama4/kernels/lib
    python llama4/kernels/build.py native           the level that this CPU would take, in a third of the time
    python llama4/kernels/build.py --to DIRECTORY LEVEL ...

`pip install` runs it (CMakeLists.txt), before anything else is installed: it imports the standard library only. The
compiler is `$CXX`, else c++, g++ or clang++, whichever is there; `$CXXFLAGS` come last.
`$LLAMA4_BUILD_LEVELS` names the levels where none is on the command line, "none" for none. Whatever fails is written to
the manifest, beside what was built.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

SOURCES = Path(__file__).resolve().parent / "cpp"
DIRECTORY = Path(__file__).resolve().parent / "lib"
MANIFEST = "manifest.json"
LEVELS_VARIABLE = "LLAMA4_BUILD_LEVELS"

OPENMP = """
#include <omp.h>
#if defined(__clang__) && defined(__linux__)
#error its code calls functions of LLVM's OpenMP, and torch brings GCC's
#endif
"""
"""What compiles where OpenMP can be used."""
COMPILERS = ("c++", "g++", "clang++")

FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"),
    *("-ffp-contract=fast", "-fno-trapping-math", "-fno-signed-zeros"),
)
"""No vector is an argument of what a library exports, which -Wpsabi is about; pragmas are unknown without OpenMP."""
LINK = {"Darwin": ("-dynamiclib", "-undefined", "dynamic_lookup")}
"""By system. OpenMP is not linked: its functions are those that torch has loaded, so that both share their threads."""


class Level(NamedTuple):
    """An instruction set.

    Attributes:
        flags: what the compiler is told.
        features: what a CPU must have, in the words of Linux's /proc/cpuinfo.
    """

    flags: tuple[str, ...]
    features: frozenset[str]


_AVX2 = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512vbmi"}

LEVELS: dict[str, dict[str, Level]] = {
    "x86_64": {
        "avx2": Level(("-march=x86-64-v3",), _AVX2),
        "avx512": Level(("-march=x86-64-v4",), _AVX512),
        "avx512bf16": Level(("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi"), _AVX512_BF16),
    },
    "aarch64": {"neon": Level((), frozenset({"asimd"}))},
}
"""Machine -> name -> level, the best last. Each is here because the sources are faster with it; they have nothing yet
for VNNI, AMX, or NEON's dotprod, i8mm and bf16."""


def machine() -> str:
    """A key of `LEVELS`, if this machine has any."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def cpu_features() -> frozenset[str]:
    """What this CPU has and its system lets programs use, in the words of Linux's /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:  # not Linux
        pass
    return frozenset({"asimd"} if machine() == "aarch64" else ())  # every aarch64 has it


def runs(features: frozenset[str]) -> list[str]:
    """The levels of this machine that a CPU with these features runs, the best last."""
    return [name for name, level in LEVELS.get(machine(), {}).items() if level.features <= features]


def sources_hash() -> str:
    """Of all files in `cpp/`, and of the flags: what the libraries are built of."""
    digest = hashlib.sha256(repr((FLAGS, [level.flags for level in LEVELS.get(machine(), {}).values()])).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compiler() -> list[str] | None:
    """The command of a C++ compiler; None if there is none. scikit-build-core sets `$CXX` to what Python was compiled
    with, which need not be there."""
    commands = [os.environ.get("CXX", ""), *COMPILERS]
    return next((found for found in map(shlex.split, commands) if found and shutil.which(found[0])), None)


def build(directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write the libraries and the manifest of these levels; what was there before goes. -> the manifest:

    sources: `sources_hash()`. compiler: its name and version, "" without one. openmp: whether it has OpenMP; without,
    the kernels run in one thread. levels: name -> file, sha256 and seconds of each library. problems: name -> why
    there is none; "" for all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"sources": sources_hash(), "compiler": "", "openmp": False, "levels": {}}
    manifest["problems"] = {}
    command = compiler()
    if command is None:
        manifest["problems"][""] = f"there was no C++ compiler ({', '.join(COMPILERS)})"
    elif not names:
        manifest["problems"][""] = f"nothing was to be built on {machine()}"
    else:
        with TemporaryDirectory(prefix="llama4-kernels-") as work, ThreadPoolExecutor(_cores()) as pool:
            try:
                manifest["compiler"] = _run([*command, "--version"]).splitlines()[0]
                manifest["openmp"] = _has_openmp(command, Path(work))
            except (OSError, subprocess.SubprocessError, IndexError) as error:
                manifest["problems"][""] = f"the C++ compiler does not run: {_first_line(error)}"
                names = ()
            command = [*command, *FLAGS, *(["-fopenmp"] if manifest["openmp"] else [])]
            jobs = {name: pool.submit(_compile, command, name, Path(work)) for name in names}
            for name, job in jobs.items():
                try:
                    path, seconds = job.result()
                    entry = {"file": path.name, "sha256": file_hash(path), "seconds": round(seconds)}
                    _move(path, directory)
                    manifest["levels"][name] = entry
                except (OSError, subprocess.SubprocessError) as error:
                    manifest["problems"][name] = _first_line(error)
    text = directory / f"{MANIFEST}.{os.getpid()}"
    text.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    text.replace(directory / MANIFEST)
    files = {MANIFEST, *(entry["file"] for entry in manifest["levels"].values())}
    for path in directory.iterdir():
        if path.name not in files and path.name.startswith("llama4-"):
            path.unlink()
    return manifest


def _compile(command: list[str], name: str, work: Path) -> tuple[Path, float]:
    """A level's library, and the seconds that it took."""
    began = time.monotonic()
    objects, library = work / f"{name}.o", work / f"llama4-{name}.so"
    flags = [*LEVELS[machine()][name].flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    _run([*command, *flags, "-c", str(SOURCES / "api.cpp"), "-o", str(objects)])
    linker = [part for part in command if part != "-fopenmp"]
    _run([*linker, *LINK.get(platform.system(), ("-shared",)), str(objects), "-o", str(library)])
    return library, time.monotonic() - began


def _has_openmp(command: list[str], work: Path) -> bool:
    path = work / "openmp.cpp"
    path.write_text(OPENMP)
    try:
        _run([*command, "-fopenmp", "-c", str(path), "-o", str(work / "openmp.o")])
    except subprocess.SubprocessError:
        return False
    return True


def _move(path: Path, directory: Path) -> None:
    """At once: a process that has the old file open keeps it."""
    unfinished = directory / f"{path.name}.{os.getpid()}"
    shutil.copyfile(path, unfinished)
    unfinished.replace(directory / path.name)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise subprocess.SubprocessError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line), lines[0])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 0 if everything that was asked for was built."""
    levels = LEVELS.get(machine(), {})
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=DIRECTORY, metavar="DIRECTORY", help=f"(default: {DIRECTORY})")
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help=f"native, or some of: {', '.join(levels)}")
    parser.add_argument("--optional", action="store_true", help="end with 0 whatever fails")
    options = parser.parse_args(arguments)
    names = options.levels or os.environ.get(LEVELS_VARIABLE, "").replace(",", " ").split() or [*levels]
    if names == ["native"]:
        names = runs(cpu_features())[-1:]
    names = [] if names == ["none"] else names
    if unknown := set(names) - set(levels):
        parser.error(f"no such level on {machine()}: {', '.join(sorted(unknown))}")
    manifest = build(options.to, names)
    for entry in manifest["levels"].values():
        print(f"{options.to / entry['file']}: {entry['seconds']} s, {manifest['compiler']}")
    for name, problem in manifest["problems"].items():
        print(f"{name or 'no CPU kernels'}: {problem}", file=sys.stderr)
    return 0 if options.optional else int(bool(manifest["problems"]))


if __name__ == "__main__":
    sys.exit(main())
