"""Parity holds on every way through the model: torch's products, and the compiled kernels that models of these widths
are too small for by themselves."""

from __future__ import annotations

import pytest

from llama4.kernels import build
from llama4.ops import cpu_kernels


@pytest.fixture(params=["torch", "kernels"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "kernels":
        if build.library() is None:
            pytest.skip("the kernels cannot be built here: no C++ compiler")
        monkeypatch.setattr(cpu_kernels, "MIN_WIDTH", 1)
        monkeypatch.setattr(cpu_kernels, "MIN_MATRIX", 1)
    return name
