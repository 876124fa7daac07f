"""The list of mistakes in mutations.py still fits the code. (Making them all takes minutes: run it by hand.)"""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mistake_can_be_made(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.right) == 1
    assert mutation.wrong != mutation.right
    path, _, name = mutation.test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text()
