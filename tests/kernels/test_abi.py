"""Python and C++ agree, and a library that differs is refused."""

from __future__ import annotations

import ctypes
import logging
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from llama4.cache.formats import QUANTIZED
from llama4.kernels import abi, build
from llama4.quantization.formats import FORMATS

needs_kernels = pytest.mark.skipif(build.library() is None, reason="the kernels cannot be built here: no C++ compiler")
TARGETS = ["x86-64", "x86-64-v3", "x86-64-v4", "sapphirerapids"]
"""Without and with AVX-512, and with its products of bfloat16."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library, whatever it says."""
    found: list[ctypes.CDLL] = []
    monkeypatch.setattr(abi, "bind", found.append)
    build._load()
    monkeypatch.undo()
    return found[0]


@needs_kernels
def test_all_kernels_are_bound(compiled: ctypes.CDLL) -> None:
    assert set(abi.bind(compiled).functions) == {(name, dtype) for name in abi.SIGNATURES for dtype in abi.DTYPES}


@needs_kernels
def test_formats_are_those_of_the_registries(compiled: ctypes.CDLL) -> None:
    """By name, each with a number of its own."""
    library = abi.bind(compiled)
    assert set(library.weight_formats) <= set(FORMATS)
    assert set(library.cache_formats) == {"unquantized", *QUANTIZED}
    for formats, dense in ((library.weight_formats, len(abi.MatrixLayout)), (library.cache_formats, 0)):
        assert [format.number for format in formats.values()] == [dense + i for i in range(len(formats))]


@needs_kernels
@pytest.mark.parametrize("name", ["MAX_GEMV_ROWS", "MAX_HEAD_DIM", "LANES", "INTERLEAVE", "STRIP", "CACHE_BLOCK"])
def test_another_constant_is_refused(name: str, compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    value = getattr(abi, name)
    monkeypatch.setattr(abi, name, value + 1)
    with pytest.raises(abi.AbiError, match=f"is {value + 1} in Python and {value} in C"):
        abi.bind(compiled)


@needs_kernels
def test_other_structures_are_refused(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    class LayerStep(ctypes.Structure):
        _fields_ = [(name, ctypes.c_int64) for name in ("temperatures", "rotations", "lengths", "block_table", "width")]

    monkeypatch.setattr(abi, "LayerStep", LayerStep)
    with pytest.raises(abi.AbiError) as error:
        abi.bind(compiled)
    for difference in (
        "LayerStep is 40 in Python and 48 in C++",
        "LayerStep.rotations is 8 in Python and 0 in C++",
        "LayerStep.format is None in Python and 40 in C++",
    ):
        assert difference in str(error.value)


@needs_kernels
def test_another_signature_is_refused(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.SIGNATURES, "swiglu", abi.SIGNATURES["swiglu"][:-1])
    with pytest.raises(abi.AbiError, match=r"'swiglu', 'float32'.* is ppqqq in Python and ppqqqp in C"):
        abi.bind(compiled)


@needs_kernels
def test_a_refused_library_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """torch does the work, and an error says why."""
    monkeypatch.setattr(abi, "STRIP", 16)
    monkeypatch.setattr(build, "_loaded", None)
    with caplog.at_level(logging.ERROR):
        assert build.library() is None
    assert "strip is 16 in Python and 32 in C++" in caplog.text


def test_every_file_is_built() -> None:
    """In one piece, each file behind those that it includes."""
    assert set(build.SOURCES) == {path.name for path in build.DIRECTORY.iterdir() if path.suffix in (".h", ".cpp")}
    for i, name in enumerate(build.SOURCES):
        for line in (build.DIRECTORY / name).read_text(encoding="utf-8").splitlines():
            if line.startswith('#include "'):
                assert line.split('"')[1] in build.SOURCES[:i]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
class TestWarnings:
    FLAGS = ("-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Werror", *build.FLAGS)

    @pytest.mark.parametrize("target", TARGETS)
    def test_any_machine(self, target: str) -> None:
        command = ["g++", *self.FLAGS, f"-march={target}", "-fsyntax-only", str(build.DIRECTORY / "api.cpp")]
        subprocess.run(command, check=True)

    def test_optimised(self, tmp_path: Path) -> None:
        """Some warnings come of what is inlined."""
        output = ["-o", str(tmp_path / "api.o"), str(build.DIRECTORY / "api.cpp")]
        subprocess.run(["g++", *self.FLAGS, "-march=native", "-O2", "-c", *output], check=True)
