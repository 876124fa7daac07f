"""The kernels of a machine that is not this one: a program of them (native.cpp), run by qemu."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llama4.kernels import build

COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(QEMU)), reason=f"needs {COMPILER} and {QEMU}")
@pytest.mark.parametrize("level", build.LEVELS["aarch64"])
def test_aarch64(level: str, tmp_path: Path) -> None:
    sources = [str(build.SOURCES / "api.cpp"), str(Path(__file__).with_name("native.cpp"))]
    flags = [*build.FLAGS, *build.LEVELS["aarch64"][level].flags, "-O2", "-static", "-pthread"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(tmp_path / "native")], check=True)
    done = subprocess.run([QEMU, str(tmp_path / "native")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"
