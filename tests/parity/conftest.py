"""Parity holds on every way through the model: torch's products, and the compiled kernels that models of these widths
are too small for by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llama4.kernels import loader
from llama4.ops import cpu_kernels


@pytest.fixture(params=["torch", "kernels"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if name == "torch":
        yield name
        return
    if loader.library() is None:
        pytest.skip("the kernels are not built here")
    with cpu_kernels.any_size():
        yield name
