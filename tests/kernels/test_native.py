"""Every kernel against float64, by a program in C++ (native/): of each level of this machine, and of aarch64's under
qemu."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llama4.kernels import build, loader
from tests.marks import needs_kernels

PROGRAM = Path(__file__).with_name("native") / "main.cpp"
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror")


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" checks, 0 failures\n")


@needs_kernels
def test_levels_of_this_machine(tmp_path: Path) -> None:
    """Those that were built and that this CPU runs: at least the one that all other tests take."""
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    found = loader.found()
    levels = [level for level in build.runs(build.cpu_features()) if level in found.built]
    assert found.level in levels
    objects = tmp_path / "native.o"
    subprocess.run([*compiler, *FLAGS, "-c", PROGRAM, "-o", objects], check=True)
    for level in levels:
        library = Path(found.directory) / f"llama4-{level}.so"
        subprocess.run(
            [*compiler, objects, library, f"-Wl,-rpath,{library.parent}", "-o", tmp_path / level], check=True
        )
        run(tmp_path / level)


@pytest.mark.skipif(not (shutil.which(CROSS) and shutil.which(QEMU)), reason=f"needs {CROSS} and {QEMU}")
@pytest.mark.parametrize("level", build.LEVELS["aarch64"])
def test_aarch64(level: str, tmp_path: Path) -> None:
    """Optimised less than what is shipped, which takes a minute for each level to compile."""
    flags = (*build.FLAGS, *build.LEVELS["aarch64"][level].flags, "-O1")
    source = build.SOURCES / "api.cpp"
    subprocess.run([CROSS, *flags, "-static", PROGRAM, source, "-o", tmp_path / "native"], check=True)
    run(QEMU, tmp_path / "native")
