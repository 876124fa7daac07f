"""What some tests need."""

from __future__ import annotations

import pytest

from llama4.kernels import loader

needs_kernels = pytest.mark.skipif(loader.library() is None, reason="the kernels are not built here")
