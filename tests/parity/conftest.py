"""Parity holds on every way through the model: torch's products, and the compiled kernels that models of these widths
are in part too small for by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity.ways import WAYS, computed_by


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with computed_by(request.param):
        yield request.param
