"""AMX, by an emulation of its instructions (amx/emulated_tiles.h): no machine that these tests ran on had it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_long, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4.kernels import build, cpu, loader
from tests.marks import needs_kernels

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).with_name("amx") / "emulated_tiles.h"
LEVELS = build.LEVELS.get("x86_64", {})
LEVEL, BASE = "amx", "avx512bf16"
HAS_AMX = "amx_tile" in build.cpu_features()

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(BASE not in loader.found().built, reason=f"needs the level {BASE}"),
    pytest.mark.skipif(BASE not in build.runs(build.cpu_features()), reason=f"needs a CPU that runs {BASE}"),
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
]


def built(directory: Path, *flags: str) -> Path:
    """A copy of the libraries, with that of AMX compiled with these flags beside them."""
    shutil.copytree(loader.found().directory, directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", " ".join(flags))
        told = build.build(directory, [LEVEL])
    assert told["problems"] == {}
    return directory


def emulated(directory: Path, *flags: str) -> Path:
    return built(directory, f"""-DLLAMA4_TILES='"{EMULATION}"'""", *flags)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated(tmp_path_factory.mktemp("amx") / "lib")


@pytest.fixture
def _features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has AMX, too."""
    features = build.cpu_features() | LEVELS[LEVEL].features
    monkeypatch.setattr(build, "cpu_features", lambda: features)
    monkeypatch.delenv(loader.LEVEL, raising=False)


# ---- the emulation


class Amx(ctypes.Structure):
    _fields_ = [
        ("begin", CFUNCTYPE(None, c_long)),
        ("end", CFUNCTYPE(None)),
        ("add_pairs", CFUNCTYPE(None, c_void_p, c_long, c_void_p, c_long, c_long, c_void_p)),
        ("multiply_bytes", CFUNCTYPE(None, c_void_p, c_long, c_void_p, c_long, c_void_p)),
    ]


def functions(directory: Path) -> Amx:
    library = ctypes.CDLL(str(directory / f"llama4-{LEVEL}.so"))
    amx = POINTER(Amx)()
    library.llama4_amx.restype = c_char_p
    assert library.llama4_amx(ctypes.byref(amx)) is None
    return amx.contents


def flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.zeros_like(x), x)


@pytest.mark.parametrize("rows", [16, 32])
def test_the_emulation_adds_in_the_order_of_the_instruction(rows: int, emulation: Path) -> None:
    """16 pairs of inputs at a time: first and second ones apart, a product of bfloat16 being exact in float32. Numbers
    that are not normal are zero."""
    words, generator = 48, torch.Generator().manual_seed(rows)
    a, b = torch.randn(rows, words, 2, generator=generator).bfloat16(), torch.randn(words, 32, 2, generator=generator)
    b = b.bfloat16()
    a[:, :8] *= 2.0**-62
    b[:8] *= 2.0**-63
    a[3, 9:20], b[9:20, 5] = 2.0**-130, 2.0**100
    sums = torch.randn(rows, 32, generator=generator)
    sums[:8], sums[8] = 0, 2.0**-127
    expected = flushed(sums)
    products = flushed(flushed(a.float())[:, :, None] * flushed(b.float()))
    for first in range(0, words, 16):
        own = torch.zeros(rows, 32, 2)
        for k in range(first, first + 16):
            own = flushed(own + products[:, k])
        expected = flushed(expected + flushed(own[..., 0] + own[..., 1]))
    amx = functions(emulation)
    amx.begin(16)
    amx.add_pairs(a.data_ptr(), words, b.data_ptr(), words, rows, sums.data_ptr())
    amx.end()
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_the_emulation_multiplies_signed_bytes_with_unsigned_ones(depth: int, emulation: Path) -> None:
    words, generator = 48, torch.Generator().manual_seed(depth)
    a = torch.randint(-128, 128, (16, words, 4), generator=generator, dtype=torch.int8)
    b = torch.randint(0, 256, (words, 32, 4), generator=generator, dtype=torch.uint8)
    sums = torch.full((16, 32), 7, dtype=torch.int32)
    amx = functions(emulation)
    amx.begin(depth)
    amx.multiply_bytes(a.data_ptr(), words, b.data_ptr(), words, sums.data_ptr())
    amx.end()
    assert torch.equal(sums.long(), torch.einsum("mki,kni->mn", a.long(), b.long()))


# ---- the kernels

CHILD = """
import ctypes
import sys
from pathlib import Path
from llama4.kernels import build, loader
directory = Path(sys.argv[1])
features = build.cpu_features() | build.LEVELS["x86_64"]["amx"].features
build.cpu_features, build.found_directory = lambda: features, lambda: directory
assert loader.found().level == "amx", loader.found()
{}
tiles = ctypes.CDLL(str(directory / "llama4-amx.so"))
assert all(ctypes.c_long.in_dll(tiles, name).value > 0 for name in ("llama4_pairs", "llama4_bytes"))
"""
"""What uses kernels in a process of its own, which has AMX; and products of both kinds went by it."""
PARITY = """
import pytest
assert pytest.main([*"-n 0 -p no:cacheprovider".split(), *sys.argv[2:]]) == 0
"""
PRODUCTS = """
import torch
from tests.kernels.test_amx import products
torch.save(products(), sys.argv[2])
"""
SAMPLE = (
    "tests/kernels/test_cpu.py::TestProducts",
    "tests/kernels/test_gguf_blocks.py::TestProducts::test_many_rows",
    "tests/kernels/test_gguf_blocks.py::TestInt8Activations::test_products_of_integers",
    "tests/kernels/test_int8_inputs.py::TestInt8Inputs::test_products_of_integers",
    *("-k", "(40 or 75) and dtype1"),
)
"""Products of many rows in bfloat16, against float64."""


def run(script: str, directory: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment.pop(loader.LEVEL, None)
    command = [sys.executable, "-P", "-c", CHILD.format(script), str(directory), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_computes_what_the_parity_suite_expects(emulation: Path) -> None:
    told = run(PARITY, emulation, *SAMPLE)
    assert " passed" in told
    assert "skipped" not in told


def products() -> dict[str, Tensor]:
    """Of few and of many rows; inputs in bfloat16 are whole tiles, or some pairs more."""
    generator = torch.Generator().manual_seed(0)
    results = {}
    for rows in (15, 16, 17, 31, 32, 33, 48, 75, 200):
        x = torch.randn(rows, 768, generator=generator).bfloat16()
        weight_OI = torch.randn(96, 768, generator=generator).bfloat16()
        results[f"dense {rows}"] = cpu.linear(x, weight_OI)
        for inputs in (32, 70, 768):
            own = x[:, :inputs].contiguous()
            results[f"in x out {inputs} {rows}"] = cpu.linear_in_out(own, weight_OI.mT[:inputs].contiguous())
        codes = torch.randint(0, 256, (96, 768), generator=generator, dtype=torch.uint8)
        scale = torch.rand(96, 1, generator=generator).bfloat16()
        fours = torch.randint(-(2**31), 2**31, (96, 96), generator=generator).int()
        for inputs in (64, 192, 768):  # groups of 64, 64 and 128
            part, weight = x[:, :inputs].contiguous(), codes[:, :inputs].contiguous()
            results[f"int8 {inputs} {rows}"] = cpu.linear_quantized("int8", part, weight, scale)
            results[f"integers int8 {inputs} {rows}"] = cpu.linear_quantized("int8_int8", part, weight, scale)
        for group in (32, 64, 96, 256):
            scales = torch.rand(96, 768 // group, generator=generator).bfloat16()
            results[f"int4 {group} {rows}"] = cpu.linear_quantized("int4", x, fours, scales, group)
            results[f"integers int4 {group} {rows}"] = cpu.linear_quantized("int4_int8", x, fours, scales, group)
    return results


def test_beside_the_next_level(emulation: Path, tmp_path: Path) -> None:
    """Integers to the same bits; bfloat16 too where few rows do not go by AMX, or where this machine has it."""
    run(PRODUCTS, emulation, str(tmp_path / "products"))
    by_amx, ours = torch.load(tmp_path / "products"), products()
    differ = 0
    for name, product in ours.items():
        if name.endswith(" 15") or "integers" in name or loader.found().level == LEVEL:
            assert torch.equal(by_amx[name], product), name
        else:
            error = (by_amx[name].float() - product.float()).norm() / product.float().norm()
            assert error < 2**-8, (name, error)
            differ += not torch.equal(by_amx[name], product)
    assert differ or loader.found().level == LEVEL, "AMX has an order of its own"


# ---- what guards it

PROBLEMS = {
    "WRONG_PAIRS": "a product by AMX is not what AVX512-BF16 computes",
    "WRONG_BYTES": "a product by AMX is not what AVX512-BF16 computes",
    "REFUSED": "emulated AMX is refused",
}


@pytest.mark.usefixtures("_features")
@pytest.mark.parametrize("wrong", PROBLEMS)
def test_the_next_level_serves_where_it_is_wrong(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so; whoever forces it is told."""
    directory = emulated(tmp_path / "lib", f"-D{wrong}")
    with caplog.at_level("WARNING"):
        found = loader._find(directory)
    assert (found.level, found.library is None) == (BASE, False)
    (record,) = caplog.records
    for text in (record.getMessage(), found.why):
        assert f"but {LEVEL}: {PROBLEMS[wrong]}" in text
    monkeypatch.setenv(loader.LEVEL, LEVEL)
    with pytest.raises(ValueError, match=f"LLAMA4_CPU=amx: {PROBLEMS[wrong]}"):
        loader._find(directory)


@pytest.mark.usefixtures("_features")
def test_what_is_built_asks_this_system(tmp_path: Path) -> None:
    """Which has no tiles to give, unless its CPU has them."""
    found = loader._find(built(tmp_path / "lib"))
    assert found.level == (LEVEL if HAS_AMX else BASE)
    assert HAS_AMX or found.why.endswith("but amx: the system does not let this process use the tiles of AMX")


@pytest.mark.usefixtures("_features")
def test_a_library_that_is_damaged_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = emulated(tmp_path / "lib")
    library, manifest = directory / f"llama4-{LEVEL}.so", directory / build.MANIFEST
    library.write_bytes(library.read_bytes()[:-1])
    found = loader._find(directory)
    assert found.level == BASE
    assert "but amx: " in found.why
    assert "is damaged" in found.why
    told = json.loads(manifest.read_text())
    del told["levels"][BASE]
    manifest.write_text(json.dumps(told))
    assert loader._find(directory).level not in (LEVEL, BASE)
    monkeypatch.setenv(loader.LEVEL, LEVEL)
    with pytest.raises(ValueError, match="LLAMA4_CPU=amx: it needs avx512bf16, which was not built"):
        loader._find(directory)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_its_instructions_are_there(tmp_path: Path) -> None:
    library = built(tmp_path / "lib") / f"llama4-{LEVEL}.so"
    told = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    for instruction in ("ldtilecfg", "tileloadd", "tilezero", "tdpbf16ps", "tdpbsud", "tilestored", "tilerelease"):
        assert instruction in told
