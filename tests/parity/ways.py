"""The ways through a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llama4.kernels import loader
from llama4.ops import cpu_kernels
from tests.marks import needs_kernels

TORCH, KERNELS = "torch", "kernels"
WAYS = (TORCH, pytest.param(KERNELS, marks=needs_kernels))


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """Inside, a model is computed by torch's operations, or by the compiled kernels wherever they can be used."""
    with pytest.MonkeyPatch.context() as patch, cpu_kernels.any_size():
        if way == TORCH:
            patch.setattr(loader, "library", lambda: None)
        yield
