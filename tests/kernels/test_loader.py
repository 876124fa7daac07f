"""Which library is loaded, and that nothing else than what was built ever is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama4.cli.main import main
from llama4.kernels import build, loader
from tests.marks import needs_kernels

ROOT = Path(__file__).parents[2]
OFF = os.environ.get(loader.SWITCH, "").lower() == "off"
on_x86 = pytest.mark.skipif(build.machine() != "x86_64", reason="the levels of x86-64")


@pytest.mark.skipif(not build.runs(build.cpu_features()), reason="this CPU runs no level")
@pytest.mark.skipif(OFF, reason="switched off")
def test_they_are_built_where_there_is_a_compiler() -> None:
    """Otherwise all tests that need them would be left out, and none would fail. The compiler may have been there only
    for the installation."""
    found = loader.found()
    if build.compiler() is None and not found.built:
        pytest.skip("nothing was built: there is no C++ compiler")
    assert found.library is not None, f"{found.why}"
    if not os.environ.get(loader.LEVEL):
        assert found.level == [level for level in build.runs(build.cpu_features()) if level in found.built][-1]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the libraries that were built."""
    monkeypatch.delenv(loader.LEVEL, raising=False)
    return shutil.copytree(build.directory(), tmp_path / "lib")


def base_level() -> str:
    """Of the library that this process uses, whatever is added to it."""
    own = loader.found().level
    return build.LEVELS[build.machine()][own].base or own


def library(directory: Path) -> Path:
    return directory / f"llama4-{base_level()}.so"


def rewrite(directory: Path, **changes: object) -> None:
    path = directory / build.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put(directory: Path, content: bytes) -> None:
    """In the library's place; whoever has that loaded keeps it."""
    library(directory).unlink()
    library(directory).write_bytes(content)


def truncate(directory: Path) -> None:
    content = library(directory).read_bytes()
    put(directory, content[: len(content) // 2])


def alter(directory: Path) -> None:
    content = bytearray(library(directory).read_bytes())
    content[len(content) // 2] ^= 1
    put(directory, bytes(content))


def exchange(directory: Path, path: Path) -> None:
    """By a file that the manifest knows."""
    put(directory, path.read_bytes())
    entry = {"file": library(directory).name, "sha256": build.file_hash(path), "compiler": ""}
    rewrite(directory, levels={base_level(): entry})


def foreign(directory: Path) -> None:
    import _ctypes

    exchange(directory, Path(_ctypes.__file__))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is damaged, or not the file that was built"),
    "altered": (alter, "is damaged, or not the file that was built"),
    "of another program": (foreign, "cannot be used (.*undefined symbol: llama4_constants"),
    "no library": (lambda directory: exchange(directory, Path(__file__)), "cannot be used (.*invalid ELF header"),
    "missing": (lambda directory: library(directory).unlink(), "cannot be used (.*No such file"),
    "of other sources": (lambda directory: rewrite(directory, sources="0"), "was built from other sources"),
    "no manifest": (lambda directory: (directory / build.MANIFEST).unlink(), "they were not built"),
    "a damaged manifest": (lambda directory: (directory / build.MANIFEST).write_text('{"levels"'), "is damaged"),
    "another's manifest": (lambda directory: (directory / build.MANIFEST).write_text("[]"), "is damaged"),
    "a manifest of less": (lambda directory: rewrite(directory, levels={"avx2": {}}), "is damaged"),
    "nothing built": (
        lambda directory: rewrite(directory, levels={}, problems={"": "there was no C++ compiler"}),
        "not used, which is slower: there was no C.. compiler",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_not_built_here_is_not_loaded(name: str, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torch serves, and one line says why."""
    damage, message = DAMAGES[name]
    damage(copy)
    with caplog.at_level("WARNING"):
        found = loader._find(copy)
    assert found.library is None
    assert found.level == ""
    (record,) = caplog.records
    message = message.replace("(", r"\(")
    assert re.search(message, record.getMessage())
    assert found.why in record.getMessage()
    assert "pip install" in found.why


@on_x86
@needs_kernels
class TestLevels:
    def test_unknown(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(loader.LEVEL, "sse9")
        with pytest.raises(ValueError, match="LLAMA4_CPU=sse9: there is no such level on x86_64; avx2, avx512, "):
            loader._find(copy)

    def test_not_of_this_cpu(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(loader.LEVEL, "AVX512")
        monkeypatch.setattr(build, "cpu_features", lambda: build.LEVELS["x86_64"]["avx2"].features)
        with pytest.raises(ValueError, match=r"LLAMA4_CPU=avx512: this CPU lacks avx512bw, .*; it runs avx2"):
            loader._find(copy)

    def test_not_built(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(loader.LEVEL, "avx2")
        rewrite(copy, levels={})
        with pytest.raises(ValueError, match="LLAMA4_CPU=avx2: this level was not built"):
            loader._find(copy)

    def test_the_best_that_is_there(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        built = json.loads((copy / build.MANIFEST).read_text())["levels"]
        for level in build.runs(build.cpu_features()):
            if level in built:
                monkeypatch.setattr(build, "cpu_features", lambda level=level: build.LEVELS["x86_64"][level].features)
                assert loader._find(copy).level == level
        monkeypatch.setattr(build, "cpu_features", frozenset)
        assert "this CPU runs none of" in loader._find(copy).why
        assert caplog.records

    def test_off_comes_first(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(loader.SWITCH, "OFF")
        monkeypatch.setenv(loader.LEVEL, "sse9")
        assert loader._find(copy) == loader.Found(None, "", "LLAMA4_CPU_KERNELS=off")


NEOVERSE_N1 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
ARM_CPUS = {
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid": "neon",  # Cortex-A72
    NEOVERSE_N1: "neon-dotprod",
    f"{NEOVERSE_N1} sha3 sha512 sve asimdfhm uscat ilrcpc flagm dcpodp i8mm bf16 svei8mm svebf16 dgh rng": "neon-i8mm",
    f"{NEOVERSE_N1} svei8mm": "neon-dotprod",
}


class TestAarch64:
    @pytest.fixture
    def find(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], loader.Found]:
        """What a machine with these features takes of libraries of all levels."""
        monkeypatch.delenv(loader.LEVEL, raising=False)
        monkeypatch.setattr(build, "machine", lambda: "aarch64")
        monkeypatch.setattr(loader, "_load", lambda directory, levels, level: None)
        levels = {name: {"file": name, "sha256": "", "compiler": "g++"} for name in build.LEVELS["aarch64"]}
        manifest = {"sources": build.sources_hash(), "levels": levels, "problems": {}}
        (tmp_path / build.MANIFEST).write_text(json.dumps(manifest))
        monkeypatch.setattr(build, "CPUINFO", tmp_path / "cpuinfo")

        def find(features: str) -> loader.Found:
            build.CPUINFO.write_text(f"processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: {features}\nCPU part\t: 0xd0c\n")
            return loader._find(tmp_path)

        return find

    @pytest.mark.parametrize("features", ARM_CPUS)
    def test_the_best_of_what_cpuinfo_names(self, features: str, find: Callable[[str], loader.Found]) -> None:
        assert find(features).level == ARM_CPUS[features]

    def test_forced(self, find: Callable[[str], loader.Found], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(loader.LEVEL, "neon")
        assert find(NEOVERSE_N1).level == "neon"
        monkeypatch.setenv(loader.LEVEL, "neon-i8mm")
        with pytest.raises(ValueError, match=r"this CPU lacks i8mm; it runs neon, neon-dotprod$"):
            find(NEOVERSE_N1)


SAMPLE = (
    "tests/kernels/test_decoder.py::test_equals_token_by_token",
    "tests/kernels/test_cpu.py::TestProducts",
    *("-k", "drafts or 5- or 75-"),
)
"""Products of few and of many rows against float64, steps of small models against torch: float32, bfloat16, int8, int4
and fp8."""
CHILD = """
import sys
import pytest
from llama4.kernels import loader
assert loader.found().level == sys.argv[1], loader.found()
sys.exit(pytest.main([*"-n 0 -p no:cacheprovider".split(), *sys.argv[2:]]))
"""


@needs_kernels
@pytest.mark.parametrize("level", [name for names in build.LEVELS.values() for name in names])
def test_other_levels_compute_the_same(level: str) -> None:
    """All other tests run at the level that this process uses."""
    found = loader.found()
    if level == found.level or level not in build.runs(build.cpu_features()) or level not in found.built:
        pytest.skip("the level of this process, or not of this CPU, or not built")
    environment = os.environ | {loader.LEVEL: level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", CHILD, level, *SAMPLE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("off", [True, False], ids=["switched off", "not built"])
def test_without_kernels(off: bool, tmp_path: Path) -> None:
    """Everything runs, and is told once why it is slower, unless that was asked for."""
    script = """if True:
        import sys
        from pathlib import Path
        import torch
        from llama4.kernels import build, loader
        from llama4.ops import linear
        build.INSTALLED = Path(sys.argv[1])
        x, weight = torch.randn(2, 512), torch.randn(1024, 512)
        assert loader.library() is None
        assert torch.allclose(linear.linear(x, weight), x @ weight.mT, atol=1e-3)
        assert torch.allclose(linear.linear_in_out(x, weight.mT.contiguous()), x @ weight.mT, atol=1e-3)
        """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop(loader.LEVEL, None)
    environment[loader.SWITCH] = "off" if off else ""
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("CPU kernels are not used") == (0 if off else 1)


def test_info_says_what_is_used_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    found = loader.found()
    assert main(["info", "--system", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kernels"] == (found.level or f"none, torch serves: {found.why}")
    assert told["levels built"] == [*found.built]
    assert told["levels of this CPU"] == build.runs(build.cpu_features())
    assert main(["info", "--system"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert lines["kernels"] == told["kernels"]
    for arguments in (["info"], ["info", "tiny", "--system"]):
        with pytest.raises(SystemExit):
            main(arguments)
