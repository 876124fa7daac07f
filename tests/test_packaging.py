"""What is installed, in every way of installing it, beside a user's own files. Builds as pip does, offline.

The kernels are not compiled again here: in the compiler's place stands a script that copies those that are there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llama4.kernels import build as kernels
from llama4.kernels import loader

ROOT = Path(__file__).parents[1]

BUILDS = importlib.util.find_spec("scikit_build_core") and (shutil.which("cmake") or importlib.util.find_spec("cmake"))
pytestmark = pytest.mark.skipif(not BUILDS, reason="scikit-build-core or CMake is not installed")
LIB = "llama4/kernels/lib"
COMPILER = f"""#!/bin/sh
if [ "$1" = --version ]; then echo "a script 1.0"; exit; fi
while [ "$1" != -o ]; do shift; done
cp "{kernels.directory()}/$(basename "$2")" "$2" 2>&- || touch "$2"
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc")

ANSWER = """
import sys
import llama4
import llama4.vision.images
from llama4 import Llama4, VisionConfig, load_image
from llama4.vision import VisionConfig as same
assert VisionConfig is same and load_image is llama4.vision.images.load_image
llm = Llama4.from_pretrained("tiny", progress=False)
picture = {"type": "image", "image": sys.argv[1]}
question = {"type": "text", "text": "What colour is the circle?"}
print(llm.chat([{"role": "user", "content": [picture, question]}], max_new_tokens=8).text)
"""
KERNELS = """
import json
from llama4.kernels import build, loader
print(json.dumps([str(build.directory()), loader.found().level, loader.found().why]))
"""
GLOBAL = """
import importlib.util
import llama4.vision
print([name for name in ("vision", "tests", "examples", "docs", "scripts", "bench") if importlib.util.find_spec(name)])
"""


def build(kind: str, directory: Path, source: Path = ROOT, **variables: str) -> Path:
    """The file that the build backend makes, called as pip calls it."""
    script = f"import sys; sys.path.insert(0, 'scripts'); import backend; print(backend.build_{kind}(sys.argv[1]))"
    path = directory / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    variables = {"CXX": str(path), **variables}
    done = python("-c", script, directory, cwd=source, path=None, **variables)
    return directory / done.split()[-1]


def python(*arguments: str | Path, cwd: Path, path: Path | None = None, **variables: str) -> str:
    """Its output. Only `path` comes before what is installed."""
    ours = ("PYTHONPATH", "PYTHONSAFEPATH", loader.LEVEL, kernels.LEVELS_VARIABLE)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {**({"PYTHONPATH": str(path)} if path else {}), **variables}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def unpack(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an sdist holds."""
    directory = tmp_path_factory.mktemp("source")
    with tarfile.open(build("sdist", directory)) as archive:
        archive.extractall(directory / "source", filter="data")
    (source,) = (directory / "source").iterdir()
    return source


def told(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / kernels.MANIFEST).read_text())
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's, with files of the names that rooms of ours have."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("vision", "bench", "tests", "config", "text", "model", "cache", "ops"):
        (folder / f"{name}.py").write_text("raise AssertionError('somebody imports a file of the user')\n")
    (folder / "answer.py").write_text(ANSWER)
    return folder


def test_the_wheel_answers_beside_files_of_a_user(wheel: Path, folder: Path, tmp_path: Path) -> None:
    installed = unpack(wheel, tmp_path / "installed")
    answer = python("answer.py", ROOT / "examples" / "shapes.png", cwd=folder, path=installed)
    assert answer == "Red.\n"


def test_the_wheel_has_one_name_and_all_it_needs(wheel: Path) -> None:
    files = names(wheel)
    info = next(file.split("/")[0] for file in files if file.endswith("/METADATA"))
    assert {file.split("/")[0] for file in files} == {"llama4", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", "llama4/py.typed"} <= set(files)
    assert {file for file in files if file.startswith("llama4/") and file.endswith(".py")} == {
        *(str(path.relative_to(ROOT)) for path in (ROOT / "llama4").rglob("*.py")),
        *(f"llama4/{path.relative_to(ROOT)}" for path in (ROOT / "vision").rglob("*.py")),
    }
    for folder in ("kernels/cpp", "serve/page", "tiny/checkpoint"):
        there = {path.name for path in (ROOT / "llama4" / folder).iterdir() if path.is_file()}
        assert there
        assert {f"llama4/{folder}/{name}" for name in there} <= set(files)
    assert not [file for file in files if "__pycache__" in file or file.endswith(".pyc")]


@pytest.mark.skipif(not kernels.LEVELS.get(kernels.machine()), reason="no kernels are built on this machine")
def test_the_wheel_brings_every_level_and_serves_every_python(wheel: Path, folder: Path, tmp_path: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    installed = unpack(wheel, tmp_path / "installed")
    files = {level: f"llama4-{level}.so" for level in kernels.LEVELS[kernels.machine()]}
    assert {path.name for path in (installed / LIB).iterdir()} == {kernels.MANIFEST, *files.values()}
    manifest = told(installed / LIB)
    assert {level: entry["file"] for level, entry in manifest["levels"].items()} == files
    assert {entry["compiler"] for entry in manifest["levels"].values()} == {"a script 1.0"}
    assert manifest["problems"] == {}
    directory, level, _ = json.loads(python("-c", KERNELS, cwd=folder, path=installed))
    assert directory == str(installed / LIB)
    assert level == loader._find(kernels.directory()).level, "the libraries that were copied are loaded"


@on_linux
@pytest.mark.parametrize("machine", [*kernels.LEVELS])
def test_a_wheel_for_many_linux_says_so(machine: str, tmp_path: Path) -> None:
    """Where what compiles keeps to an old C library; also for a machine that is not this one."""
    compiler = tmp_path / "zig"
    compiler.write_text(COMPILER.replace("cp ", "false ").replace('[ "$1" = --version ]', '[ "$2" = --version ]'))
    compiler.chmod(0o755)
    wheel = build("wheel", tmp_path, ROOT, CXX=f"{compiler} ziglang", **{kernels.MACHINE_VARIABLE: machine})
    assert wheel.name.endswith(f"-py3-none-manylinux_2_28_{machine}.whl")
    info = next(file for file in names(wheel) if file.endswith("/WHEEL"))
    with zipfile.ZipFile(wheel) as archive:
        assert f"Tag: py3-none-manylinux_2_28_{machine}\n" in archive.read(info).decode()
    manifest = told(unpack(wheel, tmp_path / "installed") / LIB)
    assert manifest["sources"] == kernels.sources_hash(machine)
    assert [*manifest["levels"]] == [*kernels.LEVELS[machine]]


@on_linux
@pytest.mark.parametrize(
    ("needs", "refused"),
    [
        (["libc.so.6", "GLIBC_2.28", "GLIBC_2.2.5", "libpthread.so.0"], None),
        (["libc.so.6", "GLIBC_2.34"], "2.34"),
        (["libc.so.6", "GLIBC_2.28.1"], "2.28.1"),
        (["libstdc++.so.6", "GLIBC_2.17"], "libstdc++.so.6"),
    ],
)
def test_a_library_that_needs_more_than_the_wheel_says_is_refused(
    needs: list[str], refused: str | None, tmp_path: Path
) -> None:
    wheel = tmp_path / "llama4-9-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lib/one.so", b"\x7fELF\0" + "\0".join(needs).encode() + b"\0")
    script = "import sys; sys.path.insert(0, 'scripts'); import backend; from pathlib import Path; "
    script += "backend.check(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(wheel)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if refused is None:
        assert done.returncode == 0, done.stderr
    else:
        assert f"must not need {refused}, as its lib/one.so does" in done.stderr


def test_without_a_compiler_it_is_installed_and_says_so(folder: Path, tmp_path: Path) -> None:
    (tools := tmp_path / "tools").mkdir()
    for tool in ("cmake", "ninja", "make"):
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    wheel = build("wheel", tmp_path, CXX="clang++", PATH=str(tools))
    installed = unpack(wheel, tmp_path / "installed")
    assert [path.name for path in (installed / LIB).iterdir()] == [kernels.MANIFEST]
    assert told(installed / LIB)["levels"] == {}
    _, level, why = json.loads(python("-c", KERNELS, cwd=folder, path=installed))
    assert level == ""
    assert "there was no C++ compiler (c++, g++, clang++)" in why


def test_the_sdist_makes_the_same_wheel(wheel: Path, source: Path, tmp_path: Path) -> None:
    there = {path.name for path in source.iterdir()}
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "tests", "llama4", "vision"} <= there
    assert not there & {"build", "dist", ".venv", ".git", "shared"}
    assert names(build("wheel", tmp_path, source)) == names(wheel)


def test_an_editable_install_claims_no_global_name(source: Path, folder: Path, tmp_path: Path) -> None:
    """Its kernels stand in the user's cache, and nothing in the checkout."""
    checkout = shutil.copytree(source, tmp_path / "checkout")
    cache = tmp_path / "cache"
    installed = unpack(build("editable", tmp_path, checkout, XDG_CACHE_HOME=str(cache)), tmp_path / "installed")
    assert not (installed / LIB).exists() and not (checkout / LIB).exists()
    (libraries,) = (cache / "llama4" / "kernels").iterdir()
    assert [*told(libraries)["levels"]] == [*kernels.LEVELS.get(kernels.machine(), {})]
    start = f"import site; site.addsitedir({str(installed)!r})\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert python("-c", start + GLOBAL, cwd=empty) == "[]\n"
    (folder / "answer.py").write_text(start + ANSWER)
    assert python("answer.py", ROOT / "examples" / "shapes.png", cwd=folder) == "Red.\n"


def test_a_checkout_needs_no_installation(tmp_path: Path) -> None:
    where = "import llama4.vision.images as i, llama4; print(i.__file__, llama4.__file__, sep='\\n')"
    files = [str(ROOT / "vision" / "images.py"), str(ROOT / "llama4" / "__init__.py")]
    assert python("-c", where, cwd=ROOT).split("\n")[:2] == files  # started in its root
    assert python("-c", where, cwd=tmp_path, path=ROOT).split("\n")[:2] == files


def test_tests_run_what_is_installed() -> None:
    """Unless PYTHONPATH names the checkout, or llama4 is nowhere else."""
    import llama4

    editable = any(type(finder).__module__.startswith("_editable_") for finder in sys.meta_path)
    chosen = str(ROOT) in map(os.path.realpath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    inside = Path(llama4.__file__).is_relative_to(ROOT / "llama4")
    assert inside == (editable or chosen)
