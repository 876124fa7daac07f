"""Every kernel against float64, by a program in C++ (native/), at each level of this machine. Those of aarch64 have
`scripts/check-aarch64`, which takes minutes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llama4.kernels import build, loader
from tests.marks import needs_kernels

PROGRAM = Path(__file__).with_name("native") / "main.cpp"
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror")
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"


@needs_kernels
def test_levels_of_this_machine(tmp_path: Path) -> None:
    """Those that were built and that this CPU runs: at least the one that all other tests take."""
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    found = loader.found()
    built = {name: level for name, level in build.LEVELS[build.machine()].items() if name in found.built}
    levels = [name for name in build.runs(build.cpu_features()) if name in built and not built[name].base]
    assert found.level in levels or built[found.level].base in levels
    objects = tmp_path / "native.o"
    subprocess.run([*compiler, *FLAGS, "-c", PROGRAM, "-o", objects], check=True)
    for level in levels:
        library = Path(found.directory) / f"llama4-{level}.so"
        link = [str(objects), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(tmp_path / level)]
        subprocess.run([*compiler, *link], check=True)
        done = subprocess.run([tmp_path / level], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (level, done.stdout + done.stderr)
        assert done.stdout.endswith(" checks, 0 failures\n")


@pytest.mark.skipif(not (shutil.which(CROSS) and shutil.which(QEMU)), reason=f"needs {CROSS} and {QEMU}")
@pytest.mark.parametrize("level", build.LEVELS["aarch64"])
def test_products_of_bytes_on_aarch64(level: str, tmp_path: Path) -> None:
    """In which its levels differ."""
    flags = (*build.FLAGS, *build.LEVELS["aarch64"][level].flags, "-O1", "-static", f"-I{build.SOURCES}")
    program = PROGRAM.with_name("bytes.cpp")
    subprocess.run([CROSS, *flags, program, "-o", tmp_path / "bytes"], check=True)
    done = subprocess.run([QEMU, tmp_path / "bytes"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr
