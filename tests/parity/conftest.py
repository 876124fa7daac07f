"""Parity holds on every way through the model: torch's products, and the compiled kernels that models of these widths
are too small for by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llama4.ops import cpu_kernels
from tests.marks import needs_kernels


@pytest.fixture(params=["torch", pytest.param("kernels", marks=needs_kernels)], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if name == "torch":
        yield name
        return
    with cpu_kernels.any_size():
        yield name
