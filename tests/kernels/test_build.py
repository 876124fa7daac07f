"""What is built by which compiler, and what is written down where nothing could be."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama4.kernels import build

COMPILER = """#!/bin/sh
case "$*" in
*--version) echo "fake 1.0"; exit ;;
*-mavx512bf16*) echo "fake: note
fake: error: unknown instruction set" >&2; exit 1 ;;
esac
for name; do :; done
for each; do echo "$each"; done > "$name"
"""
"""Writes its arguments to the last of them, as what it built."""

on_x86 = pytest.mark.skipif(build.machine() != "x86_64", reason="the levels of x86-64")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fake"
    path.write_text(COMPILER)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.delenv("CXXFLAGS", raising=False)
    return path


def manifest(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / build.MANIFEST).read_text())
    return found


@on_x86
def test_a_level_that_fails_leaves_the_others(fake: Path, tmp_path: Path) -> None:
    directory = tmp_path / "lib"
    directory.mkdir()
    told = build.build(directory, [*build.LEVELS["x86_64"]])
    assert manifest(directory) == told
    assert told["problems"] == {"avx512bf16": "fake: error: unknown instruction set"}
    assert told["sources"] == build.sources_hash()
    assert {path.name for path in directory.iterdir()} == {
        build.MANIFEST,
        *(f"llama4-{level}.so" for level in ("avx2", "avx512", "avx512vnni", "amx")),
    }
    for level, entry in told["levels"].items():
        assert entry["sha256"] == build.file_hash(directory / f"llama4-{level}.so")
        assert entry["compiler"] == "fake 1.0"


@on_x86
@pytest.mark.parametrize("sources", ["the same", "others"])
def test_levels_of_the_same_sources_stay(sources: str, fake: Path, tmp_path: Path) -> None:
    """Another run may add one; what other sources made is worth nothing."""
    build.build(tmp_path, ["avx2"])
    if sources == "others":
        (tmp_path / build.MANIFEST).write_text(json.dumps({**manifest(tmp_path), "sources": "0"}))
    assert [*build.build(tmp_path, ["avx512"])["levels"]] == [*(["avx2"] if sources == "the same" else []), "avx512"]
    assert [*build.build(tmp_path, ["avx512bf16"])["problems"]] == ["avx512bf16"]


def test_a_checkout_has_its_libraries_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sources: all checkouts of the same share them. What is installed has its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "lib")
    before = build.directory()
    assert before.parent == tmp_path / "llama4" / "kernels"
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "cpp"))
    assert build.directory() == before
    (tmp_path / "cpp" / "api.cpp").write_text("")
    assert build.directory() != before
    (tmp_path / "lib").mkdir()
    assert build.directory() == tmp_path / "lib"


@on_x86
def test_a_checkout_without_libraries_takes_those_of_its_installation(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is after `pip install .` where Python is started in the checkout; not those of other sources."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "checkout" / "lib")
    site = tmp_path / "site"
    (site / "llama4-9.dist-info").mkdir(parents=True)
    (site / "llama4-9.dist-info" / "METADATA").write_text("Name: llama4\nVersion: 9\n")
    monkeypatch.setattr(sys, "path", [str(site)])
    assert build.found_directory() == build.directory(), "an installation without libraries"
    build.build(site / "llama4" / "kernels" / "lib", ["avx2"])
    assert build.found_directory() == site / "llama4" / "kernels" / "lib"
    assert build.directory().parent == tmp_path / "llama4" / "kernels", "where a checkout's are built"
    build.build(build.directory(), ["avx2"])
    assert build.found_directory() == build.directory(), "its own come first"
    shutil.rmtree(build.directory())
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "cpp"))
    (tmp_path / "cpp" / "api.cpp").write_text("")
    assert build.found_directory() == build.directory()


@on_x86
def test_flags(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the level, and of the user."""
    monkeypatch.setenv("CXXFLAGS", "-g -DOWN='a b'")
    build._compile([str(fake)], "avx512", tmp_path)
    flags = (tmp_path / "avx512.o").read_text().splitlines()
    assert flags[len(build.FLAGS) + len(build.WARNINGS) :][:3] == ["-march=x86-64-v4", "-g", "-DOWN=a b"]


def test_the_compiler_that_is_named_or_else_another(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scikit-build-core names that which Python was compiled with, which may not be there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", f"{fake} -v")
    assert build.compiler() == [str(fake), "-v"]
    monkeypatch.setenv("CXX", "clang++ -pthread")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert build.compiler() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert build.compiler() == [sys.executable, "-m", "ziglang", "c++"], "of PyPI's package, where there is no other"
    fake.rename(tmp_path / "g++")
    assert build.compiler() == ["g++"]


@on_x86
@pytest.mark.skipif(platform.system() != "Linux", reason="glibc")
def test_flags_of_ziglang(fake: Path, tmp_path: Path) -> None:
    """It names CPUs in its own way, and builds for an older C library than that of this machine."""
    for level, name in (("avx2", "x86_64_v3"), ("avx512", "x86_64_v4")):
        build._compile([str(fake), "ziglang"], level, tmp_path)
        flags = (tmp_path / f"{level}.o").read_text().splitlines()
        assert [flag for flag in flags if "x86" in flag] == ["x86_64-linux-gnu.2.28", f"-mcpu={name}"]


@on_x86
@pytest.mark.skipif(platform.system() != "Linux", reason="glibc")
def test_another_machine(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `ziglang` builds for, or a compiler of that name; this machine's kernels do not pass for its manifest."""
    monkeypatch.setenv(build.MACHINE_VARIABLE, "aarch64")
    assert "does not build for aarch64; set CXX to ziglang" in build.build(tmp_path, ["neon"])["problems"][""]
    monkeypatch.setattr(build, "compiler", lambda: [str(fake), "ziglang"])
    told = build.build(tmp_path, ["neon"])
    assert told["problems"] == {}
    assert told["sources"] == build.sources_hash("aarch64") != build.sources_hash()
    flags = (tmp_path / told["levels"]["neon"]["file"]).read_text().splitlines()
    assert "aarch64-linux-gnu.2.28" in flags
    assert "-s" in flags, "what it adds for debuggers is ten times the code"


@on_x86
def test_a_compiler_for_another_machine(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name. What it builds in a checkout is not in the place of this machine's."""
    monkeypatch.setenv(build.MACHINE_VARIABLE, "aarch64")
    monkeypatch.setenv("CXX", str(fake.rename(fake.with_name("aarch64-linux-gnu-g++"))))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "lib")
    assert build.main([]) == 0
    assert [*manifest(build.directory("aarch64"))["levels"]] == ["neon", "neon-dotprod", "neon-i8mm"]
    assert not build.directory().exists()


@pytest.mark.parametrize(("named", "meant"), [("arm64", "aarch64"), ("AMD64", "x86_64"), ("", build.machine())])
def test_a_machine_has_several_names(named: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.MACHINE_VARIABLE, named)
    assert build.target() == meant


def test_a_machine_without_kernels_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(build.MACHINE_VARIABLE, "riscv64")
    with pytest.raises(SystemExit):
        build.main([])
    assert "LLAMA4_BUILD_MACHINE=riscv64 is not known; choose one of x86_64, aarch64" in capsys.readouterr().err


def test_ziglang_that_is_asked_for_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ziglang")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "there was no package ziglang" in build.build(tmp_path, ["neon"])["problems"][""]


@pytest.mark.skipif(importlib.util.find_spec("scikit_build_core") is None, reason="scikit-build-core is not installed")
@pytest.mark.parametrize(
    ("libc", "machine", "tag"),
    [
        (("glibc", "2.36"), build.machine(), "manylinux_2_28"),
        (("glibc", "2.17"), build.machine(), None),
        (("", ""), build.machine(), None),
        (("", ""), "aarch64" if build.machine() == "x86_64" else "x86_64", "manylinux_2_28"),
    ],
)
def test_the_tag_of_a_wheel(
    libc: tuple[str, str], machine: str, tag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an old C library where the machine that builds has one that is not older, or builds for another."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    backend = importlib.import_module("backend")
    monkeypatch.setattr(backend, "_build", lambda: build)
    monkeypatch.setattr(build, "compiler", lambda: build.ZIG)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    monkeypatch.setenv(build.MACHINE_VARIABLE, machine)
    tags = (backend._with_tag(None) or {}).get("wheel.tags")
    assert tags == (f"py3-none-{tag}_{machine}" if tag else None)


def test_ziglang_may_be_asked_for(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a compiler of the system."""
    fake.rename(fake.with_name("g++"))
    monkeypatch.setenv("PATH", str(fake.parent))
    monkeypatch.setenv("CXX", "ziglang")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert build.compiler() == build.ZIG
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert build.compiler() is None, "so that the build asks for it"


@pytest.mark.skipif(importlib.util.find_spec("scikit_build_core") is None, reason="scikit-build-core is not installed")
@pytest.mark.parametrize("there", [True, False], ids=["a compiler", "none"])
def test_pip_brings_a_compiler_where_there_is_none(there: bool, fake: Path) -> None:
    """By the hook that pip asks for what a build requires."""
    root = Path(__file__).parents[2]
    script = """if True:
        import sys
        sys.modules["ziglang"] = None  # as where it is not installed
        import backend
        print(backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable())
        """
    tools = {tool: shutil.which(tool) for tool in ("cmake", "ninja")}
    for tool, path in tools.items():
        if path:
            (fake.parent / tool).symlink_to(path)
    environment = os.environ | {"PYTHONPATH": str(root / "scripts"), "PATH": str(fake.parent)}
    if not there:
        environment["CXX"] = "nowhere"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'ziglang>=0.17,<0.18'") == (0 if there else 2)


@pytest.mark.parametrize("compiler", ["nowhere/c++", "false"])
def test_without_a_compiler_the_manifest_says_so(compiler: str, tmp_path: Path) -> None:
    """Run as `pip install` does: nothing of ours can be imported, and it does not fail."""
    script = [sys.executable, "-I", "-S", str(Path(build.__file__)), "--to", str(tmp_path)]
    environment = os.environ | {"CXX": shutil.which(compiler) or compiler, "PATH": "/nowhere"}
    environment.pop(build.LEVELS_VARIABLE, None)
    for optional, code in ((["--optional"], 0), ([], 1)):
        done = subprocess.run([*script, *optional], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert f"no CPU kernels: {(problem := next(iter(manifest(tmp_path)['problems'].values())))}\n" == done.stderr
        assert problem.startswith("there was no C++ compiler" if "nowhere" in compiler else "the C++ compiler does not")
        assert manifest(tmp_path)["levels"] == {}


@pytest.mark.parametrize("names", [["none"], ["nonsense"]])
def test_levels_are_named(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if names == ["none"]:
        assert build.main(["--optional", "--to", str(tmp_path), *names]) == 0
        assert "nothing was to be built" in str(manifest(tmp_path)["problems"])
    else:
        with pytest.raises(SystemExit):
            build.main(["--to", str(tmp_path), *names])
        assert "no such level" in capsys.readouterr().err


@on_x86
def test_a_cpu_runs_what_it_has_all_of() -> None:
    levels = build.LEVELS["x86_64"]
    assert build.runs(frozenset()) == []
    assert build.runs(levels["avx512"].features - {"fma"}) == []
    assert build.runs(levels["avx512"].features - {"avx512vl"}) == ["avx2"]
    assert build.runs(levels["avx512bf16"].features | {"more"}) == ["avx2", "avx512", "avx512vnni", "avx512bf16"]
    assert build.runs(levels["amx"].features) == [*levels]
    assert build.runs(levels["amx"].features - {"amx_int8"}) == [*levels][:-1]


@on_x86
def test_a_level_comes_with_what_it_adds_to(fake: Path, tmp_path: Path) -> None:
    """Whether that can be built or not."""
    assert build.main(["--to", str(tmp_path), "amx"]) == 1
    told = manifest(tmp_path)
    assert ([*told["levels"]], [*told["problems"]]) == (["amx"], ["avx512bf16"])
    assert (tmp_path / "llama4-amx.so").exists()


CROSS = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"needs {CROSS}")
def test_a_level_of_aarch64_asks_of_the_cpu_all_that_its_code_may_use() -> None:
    def macros(*flags: str) -> set[str]:
        command = [CROSS, *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {line.split()[1] for line in told.splitlines()}

    names = {"asimddp": "DOTPROD", "i8mm": "MATMUL_INT8", "atomics": "ATOMICS", "crc32": "CRC32", "asimdrdm": "QRDMX"}
    for name, level in build.LEVELS["aarch64"].items():
        known = {f"__ARM_FEATURE_{names[feature]}" for feature in level.features - {"asimd"}}
        assert macros(*level.flags) - macros() == known, name


@on_x86
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_level_asks_of_the_cpu_all_that_its_code_may_use() -> None:
    """The compiler's macros for its flags, against the features that are looked for."""
    macros = {"abm": "LZCNT", "bmi1": "BMI", "avx512_bf16": "AVX512BF16", "avx512_vnni": "AVX512VNNI"}
    older = {"sse3", "ssse3", "sse4_1", "sse4_2", "avx", "popcnt", "xsave"}  # every CPU with AVX2 has them
    for name, level in build.LEVELS["x86_64"].items():
        command = ["g++", *level.flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        base = subprocess.run(["g++", *command[-5:]], capture_output=True, text=True, check=True).stdout
        ours = {line.split()[1] for line in {*told.splitlines()} - {*base.splitlines()}}
        kinds = ("__AVX", "__AMX", "__FMA__", "__F16C", "__BMI", "__LZ", "__MOVBE")
        ours = {macro for macro in ours if macro.startswith(kinds)}
        known = {f"__{macros.get(feature, feature.upper())}__" for feature in level.features | older}
        assert ours <= known, name


@on_x86
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("level", ["none", *build.LEVELS["x86_64"]])
def test_no_warnings(level: str) -> None:
    """Of g++, where a level was built, and so optimised; else of its syntax. And without any level, as on a machine of
    another kind."""
    entry = build._built(build.found_directory()).get(level, {})
    if "warnings" in entry and "clang" not in entry["compiler"]:
        assert entry["warnings"] == ""
    else:
        own = build.LEVELS["x86_64"].get(level, build.Level((), "", frozenset()))
        command = ["g++", *build.FLAGS, *build.WARNINGS, "-Werror", *own.flags]
        subprocess.run([*command, "-fsyntax-only", str(build.SOURCES / own.source)], check=True)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_features_of_this_cpu() -> None:
    assert build.cpu_features() & {"sse2", "asimd", "fp"}
