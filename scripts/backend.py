"""The build backend: scikit-build-core's, and a compiler from PyPI where the machine has none. Called by pip."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from scikit_build_core import build as core
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
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


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*core.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*core.get_requires_for_build_editable(config_settings), *_compiler()]


def _compiler() -> list[str]:
    path = Path(__file__).resolve().parents[1] / "llama4" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("llama4_kernels_build", path)
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return [] if build.compiler() else [ZIG]
