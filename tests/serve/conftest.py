"""The embedded model, and a server of it, for the tests of a file that need no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llama4 import Llama4


@pytest.fixture(scope="module")
def llm() -> Llama4:
    return Llama4.from_pretrained("tiny", progress=False)


@pytest.fixture(scope="module")
def running(llm: Llama4) -> Iterator[Any]:
    from llama4.serve.settings import Settings
    from tests.serve.running import Running  # needs what only the extra "serve" installs

    server = Running(llm, Settings("tiny"))
    yield server
    server.close()
