"""`llama4 bench long`: what it says of a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama4.bench import long
from llama4.bench.engine import EngineConfig
from tests import small_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_model.write(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("cache_dtype", ["auto", "int8", "int4"])
def test_the_cache_is_that_of_the_formula(directory: str, cache_dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert long.main([directory, "--tokens", "700", "--new", "20", "--cache-dtype", cache_dtype, "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["llama4"]
    assert ours["cache_bytes"] == ours["cache_bytes_by_formula"] > 0
    assert (ours["tokens"], ours["new_tokens"]) == (700, 20)
    assert ours["prefill_seconds"] > 0
    assert ours["peak_bytes"] > ours["cache_bytes"]


def test_a_single_new_token_comes_with_the_prompt(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert long.main([directory, "--tokens", "300", "--new", "1"]) == 0
    assert "tokens/s); cache" in capsys.readouterr().out


def test_a_baseline_that_takes_too_long_is_stopped(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "40", "--new", "1", "--vs", "transformers", "--limit", "0.01"]
    assert long.main([directory, *options]) == 0
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours.startswith("llama4: prefill of 40 tokens in")
    assert theirs == "transformers: 40 tokens: not done after 10 ms"


def test_a_baseline_that_fails_is_quoted(tmp_path: Path) -> None:
    config = EngineConfig("transformers", str(tmp_path / "nothing"), "float32", 1)
    failed = long.measure_baseline(config, 4, 10, limit=100)
    assert "nothing" in failed["ended"]
