"""The build backend: scikit-build-core's, and a compiler from PyPI where the machine has none; a wheel that this
compiler built says on which Linux it runs. Called by pip."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

from scikit_build_core import build as core
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ZIG = "ziglang>=0.17,<0.18"

ALLOWED = re.compile(r"lib(c|m|pthread|dl|rt)\.so\.")
"""What a library of a manylinux wheel may ask of the system."""


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*core.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*core.get_requires_for_build_editable(config_settings), *_compiler()]


def prepare_metadata_for_build_wheel(directory: str, config_settings: Any = None) -> str:
    return core.prepare_metadata_for_build_wheel(directory, _with_tag(config_settings))


def build_wheel(directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    name = core.build_wheel(directory, _with_tag(config_settings), metadata_directory)
    if "manylinux" in name:
        check(Path(directory) / name)
    return name


def check(wheel: Path) -> None:
    """See that its libraries ask no more of a system than the wheel's name says.

    Raises:
        ValueError: one does.
    """
    newest = _numbers(_build().GLIBC)
    with zipfile.ZipFile(wheel) as archive:
        for file in (name for name in archive.namelist() if name.endswith(".so")):
            names = archive.read(file).decode("latin-1").split("\0")  # those of its dynamic section are among them
            versions = [name.removeprefix("GLIBC_") for name in names if re.fullmatch(r"GLIBC_[\d.]+", name)]
            asked = [version for version in versions if _numbers(version) > newest]
            asked += [name for name in names if re.fullmatch(r"lib[\w+-]+\.so\.\d+", name) and not ALLOWED.match(name)]
            if asked:
                raise ValueError(f"{wheel.name} must not need {', '.join(asked)}, as its {file} does")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _with_tag(settings: Any) -> Any:
    """With the tag of the machines that the wheel is for, where the compiler keeps to an old C library. One that is
    built where the C library is older still, or another, is for the machine that builds it."""
    build = _build()
    command = build.compiler() or []
    if "ziglang" not in command or build.platform.system() != "Linux":
        return settings
    library, version = build.platform.libc_ver()
    is_new_enough = library == "glibc" and _numbers(version) >= _numbers(build.GLIBC)
    if build.target() == build.machine() and not is_new_enough:
        return settings
    tag = f"py3-none-manylinux_{build.GLIBC.replace('.', '_')}_{build.target()}"
    return {"wheel.tags": tag, **(settings or {})}


def _compiler() -> list[str]:
    return [] if _build().compiler() else [ZIG]


def _build() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "llama4" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("llama4_kernels_build", path)
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build
