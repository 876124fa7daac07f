"""Which tests reach a reference, and what is said beside another version of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from tests import oracles, small_model
from tests.parity import references


@pytest.fixture
def theirs() -> references.ReferenceConfig:
    return references.reference_config()


def test_through_a_fixture_and_a_helper(request: pytest.FixtureRequest, theirs: object) -> None:
    assert oracles.reached(request.node) == {"transformers"}


def test_inside_a_function(request: pytest.FixtureRequest) -> None:
    def never() -> object:
        import bitsandbytes

        return bitsandbytes

    assert oracles.reached(request.node) == {"bitsandbytes"}


def test_ours_alone(request: pytest.FixtureRequest) -> None:
    assert small_model.config().text is not None
    assert not oracles.reached(request.node)


def test_another_version_has_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    named = oracles.named()
    assert set(oracles.ORACLES) <= set(named)
    assert all(named[oracle] for oracle in oracles.ORACLES)
    monkeypatch.setattr(oracles, "version", (named | {"tokenizers": "0.0.1"}).__getitem__)
    assert oracles.strangers() == {
        "tokenizers": f"tokenizers 0.0.1 is installed; the reference is {named['tokenizers']}"
    }


def test_one_that_is_not_installed_has_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests which need none of them run on a machine without."""

    def version(module: str) -> str:
        if module == "bitsandbytes":
            raise PackageNotFoundError(module)
        return oracles.named()[module]

    monkeypatch.setattr(oracles, "version", version)
    assert oracles.strangers() == {"bitsandbytes": "bitsandbytes is not installed"}
