"""Builds the CPU kernels: a shared library for each level of instruction set, all from the same sources in `cpp/`.

    python -m llama4.kernels.build                  in a checkout: every level
    python -m llama4.kernels.build native           the level that this CPU would take, in a third of the time
    python llama4/kernels/build.py --to DIRECTORY LEVEL ...

`pip install` runs the last (CMakeLists.txt), before anything else is installed: it imports the standard library only. A
checkout has its libraries in the user's cache, by the hash of the sources, so that all checkouts of the same sources
share them. The compiler is `$CXX`, else c++, g++ or clang++, whichever is there, else that of the package `ziglang`,
which scripts/backend.py asks for where there is no other, or where `$CXX` is "ziglang"; `$CXXFLAGS` come last.
`$LLAMA4_BUILD_LEVELS` names the levels where none is on the command line, "none" for none. `$LLAMA4_BUILD_MACHINE`
names another kind of machine than this one, which `ziglang` builds for, or a compiler that has it in its name, such as
aarch64-linux-gnu-g++. Whatever fails is written to the manifest, beside what was built.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
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
INSTALLED = Path(__file__).resolve().parent / "lib"
"""What `pip install` built; a checkout has none."""
MANIFEST = "manifest.json"
LEVELS_VARIABLE = "LLAMA4_BUILD_LEVELS"
MACHINE_VARIABLE = "LLAMA4_BUILD_MACHINE"

CPUINFO = Path("/proc/cpuinfo")
COMPILERS = ("c++", "g++", "clang++")
ZIG = [sys.executable, "-m", "ziglang", "c++"]
GLIBC = "2.28"
"""The oldest C library that what `ziglang` builds runs with: manylinux_2_28."""

FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-trapping-math", "-fno-signed-zeros"),
)
"""No vector is an argument of what a library exports, which -Wpsabi is about."""

WARNINGS = ("-Wall", "-Wextra")
"""What the compiler says for these is in the manifest: some of it comes only of what is inlined."""


class Level(NamedTuple):
    """An instruction set.

    Attributes:
        flags: what the compiler is told.
        zig: what `ziglang` is told instead.
        features: what a CPU must have, in the words of Linux's /proc/cpuinfo.
        source: what is compiled.
        base: the level to whose library this one's adds; "" if it is a library by itself.
    """

    flags: tuple[str, ...]
    zig: str
    features: frozenset[str]
    source: str = "api.cpp"
    base: str = ""


_AVX2 = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512_VNNI = _AVX512 | {"avx512_vnni"}
_AVX512_BF16 = _AVX512_VNNI | {"avx512_bf16", "avx512vbmi"}
_AMX = _AVX512_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}
_NEON = frozenset({"asimd"})
_NEON_DOTPROD = _NEON | {"atomics", "crc32", "asimdrdm", "asimddp"}
_NEON_I8MM = _NEON_DOTPROD | {"i8mm"}

LEVELS: dict[str, dict[str, Level]] = {
    "x86_64": {
        "avx2": Level(("-march=x86-64-v3",), "x86_64_v3", _AVX2),
        "avx512": Level(("-march=x86-64-v4",), "x86_64_v4", _AVX512),
        "avx512vnni": Level(("-march=x86-64-v4", "-mavx512vnni"), "x86_64_v4+avx512vnni", _AVX512_VNNI),
        "avx512bf16": Level(
            ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"),
            "x86_64_v4+avx512vnni+avx512bf16+avx512vbmi",
            _AVX512_BF16,
        ),
        "amx": Level(
            ("-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
            "x86_64_v4+amx_tile+amx_bf16+amx_int8",
            _AMX,
            source="amx.cpp",
            base="avx512bf16",
        ),
    },
    "aarch64": {
        "neon": Level((), "generic", _NEON),
        "neon-dotprod": Level(("-march=armv8.2-a+dotprod",), "generic+v8_2a+dotprod", _NEON_DOTPROD),
        "neon-i8mm": Level(("-march=armv8.2-a+dotprod+i8mm",), "generic+v8_2a+dotprod+i8mm", _NEON_I8MM),
    },
}
"""Machine -> name -> level, the best last. Each is here because the sources compute in fewer instructions with it; they
have nothing yet for NEON's bf16, or SVE."""


def machine() -> str:
    """A key of `LEVELS`, if this machine has any."""
    return _kind(platform.machine())


def _kind(name: str) -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())


def target() -> str:
    """The machine to build for.

    Raises:
        LookupError: `$LLAMA4_BUILD_MACHINE` names none that there are kernels for.
    """
    named = os.environ.get(MACHINE_VARIABLE)
    if named and _kind(named) not in LEVELS:
        raise LookupError(f"{MACHINE_VARIABLE}={named} is not known; choose one of {', '.join(LEVELS)}")
    return _kind(named) if named else machine()


def cpu_features() -> frozenset[str]:
    """What this CPU has and its system lets programs use, in the words of Linux's /proc/cpuinfo."""
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as lines:
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


def sources_hash(kind: str = machine()) -> str:
    """Of all files in `cpp/`, and of the flags: what the libraries of a kind of machine are built of."""
    digest = hashlib.sha256(repr((FLAGS, [level.flags for level in LEVELS.get(kind, {}).values()])).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compiler() -> list[str] | None:
    """The command of a C++ compiler; None if there is none. scikit-build-core sets `$CXX` to what Python was compiled
    with, which need not be there."""
    named = os.environ.get("CXX", "")
    commands = [] if named == "ziglang" else [named, *COMPILERS]
    found = next((found for found in map(shlex.split, commands) if found and shutil.which(found[0])), None)
    return found or (ZIG if importlib.util.find_spec("ziglang") else None)


def directory(kind: str = machine()) -> Path:
    """Where this llama4 has its libraries: what it was installed with; in a checkout, what is in the user's cache."""
    if INSTALLED.exists():
        return INSTALLED
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llama4" / "kernels" / sources_hash(kind)[:16]


def found_directory() -> Path:
    """`directory()`; or, for a checkout that has none, what the llama4 installed in this environment has.

    That is if it is of the same sources: Python that is started in the checkout's folder imports the checkout.
    """
    own = directory()
    if (own / MANIFEST).exists():
        return own
    try:
        installed = Path(str(importlib.metadata.distribution("llama4").locate_file("llama4/kernels"))) / INSTALLED.name
        same = json.loads((installed / MANIFEST).read_text(encoding="utf-8"))["sources"] == sources_hash()
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, LookupError, TypeError):
        return own
    return installed if same else own


def build(directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write the libraries of these levels and the manifest; others of the same sources stay. -> the manifest:

    sources: `sources_hash()`. levels: name -> file, sha256, compiler, seconds and warnings of each library. problems:
    name -> why there is none; "" for all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"sources": sources_hash(target()), "levels": _built(directory), "problems": {}}
    command = compiler()
    if command is None:
        asked = "package ziglang, which CXX asks for; `pip install ziglang`"
        any_of = f"C++ compiler ({', '.join(COMPILERS)})"
        manifest["problems"][""] = f"there was no {asked if os.environ.get('CXX') == 'ziglang' else any_of}"
    elif not names:
        manifest["problems"][""] = f"nothing was to be built for {target()}"
    elif target() != machine() and not any(target() in Path(word).name or word == "ziglang" for word in command):
        manifest["problems"][""] = (
            f"{command[0]} does not build for {target()}; set CXX to ziglang, or to a compiler with that in its name"
        )
    else:
        with TemporaryDirectory(prefix="llama4-kernels-") as work, ThreadPoolExecutor(_cores()) as pool:
            try:
                version = _run([*command, "--version"]).stdout.splitlines()[0]
            except (OSError, subprocess.SubprocessError, IndexError) as error:
                manifest["problems"][""] = f"the C++ compiler does not run: {_first_line(error)}"
                names = ()
            jobs = {name: pool.submit(_compile, command, name, Path(work)) for name in names}
            for name, job in jobs.items():
                manifest["levels"].pop(name, None)
                try:
                    path, about = job.result()
                    entry = {"file": path.name, "sha256": file_hash(path), "compiler": version, **about}
                    _move(path, directory)
                    manifest["levels"][name] = entry
                except (OSError, subprocess.SubprocessError) as error:
                    manifest["problems"][name] = _first_line(error)
    text = directory / f"{MANIFEST}.{os.getpid()}"
    text.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    text.replace(directory / MANIFEST)
    return manifest


def _built(directory: Path) -> dict[str, Any]:
    """The levels that a manifest of the same sources names."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return dict(manifest["levels"]) if manifest["sources"] == sources_hash(target()) else {}
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _compile(command: list[str], name: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """A level's library, the seconds that it took, and what the compiler warned of."""
    began = time.monotonic()
    objects, library = work / f"{name}.o", work / f"llama4-{name}.so"
    level, zig = LEVELS[target()][name], "ziglang" in command
    platforms = ["-target", f"{target()}-linux-gnu.{GLIBC}"] if zig and platform.system() == "Linux" else []
    flags = [*platforms, *([f"-mcpu={level.zig}"] if zig else level.flags)]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    environment = {"ZIG_GLOBAL_CACHE_DIR": str(work / "zig"), **os.environ}  # not in a user's home
    arguments = [*command, *FLAGS, *WARNINGS, *flags, "-c", str(SOURCES / level.source), "-o", str(objects)]
    warnings = _run(arguments, environment).stderr
    _run(
        [*command, *FLAGS, *platforms, *(["-s"] if zig else []), "-shared", str(objects), "-o", str(library)],
        environment,
    )
    return library, {"seconds": round(time.monotonic() - began), "warnings": warnings}


def _move(path: Path, directory: Path) -> None:
    """At once: a process that has the old file open keeps it."""
    unfinished = directory / f"{path.name}.{os.getpid()}"
    shutil.copyfile(path, unfinished)
    unfinished.replace(directory / path.name)


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode:
        raise subprocess.SubprocessError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
    return done


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line), lines[0])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 0 if everything that was asked for was built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    try:
        levels = LEVELS.get(target(), {})
    except LookupError as error:
        parser.error(str(error))
    parser.add_argument("--to", type=Path, metavar="DIRECTORY", help="(default: the user's cache)")
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help=f"native, or some of: {', '.join(levels)}")
    parser.add_argument("--optional", action="store_true", help="end with 0 whatever fails")
    options = parser.parse_args(arguments)
    names = options.levels or os.environ.get(LEVELS_VARIABLE, "").replace(",", " ").split() or [*levels]
    if names == ["native"]:
        names = runs(cpu_features())[-1:]
    names = [] if names == ["none"] else names
    if unknown := set(names) - set(levels):
        parser.error(f"no such level on {target()}: {', '.join(sorted(unknown))}")
    names = [name for name in levels if name in {*names, *(levels[own].base for own in names)}]
    to = options.to or directory(target())
    manifest = build(to, names)
    for name in names:
        if entry := manifest["levels"].get(name):
            print(f"{to / entry['file']}: {entry['seconds']} s, {entry['compiler']}")
    for name, problem in manifest["problems"].items():
        print(f"{name or 'no CPU kernels'}: {problem}", file=sys.stderr)
    return 0 if options.optional else int(bool(manifest["problems"]))


if __name__ == "__main__":
    sys.exit(main())
