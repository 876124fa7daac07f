"""`llama4.bench parity`: finds nothing between equal models, and the first place where two differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4.bench import __main__ as bench
from llama4.bench import baselines
from llama4.bench.parity import compare, first_difference, trace
from llama4.model import positions
from llama4.model.moe import MixtureOfExperts
from tests import small_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_model.write(tmp_path_factory.mktemp("models") / "small"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = bench.main(["parity", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_stage_of_the_way_agrees(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(capsys, directory, "--tolerance", "1e-5")
    assert code == 0
    assert report["first"] is None
    names = [stage["name"] for stage in report["stages"]]
    assert names[0] == "vision_model.patch_embedding"
    assert names.index("multi_modal_projector") < names.index("embeddings with image features")
    assert names[-1] == "language_model.lm_head"
    assert sum(name.endswith(".router") for name in names) == small_model.config().text.num_hidden_layers
    assert 0 < max(stage["error"] for stage in report["stages"]) < 1e-5


def test_names_the_first_layer_that_differs(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 3 is the one without RoPE: without its temperature, all before it still agrees."""
    monkeypatch.setattr(positions, "attention_temperature", lambda config, places, dtype: torch.ones(len(places)))
    code, report = run(capsys, directory)
    assert code == 1
    assert report["first"]["name"] == "language_model.model.layers.3.self_attn"
    assert bench.main(["parity", directory]) == 1
    assert re.search(r"first differs at language_model.model.layers.3.self_attn, by \d", capsys.readouterr().out)


def test_counts_tokens_that_go_to_other_experts(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = MixtureOfExperts.forward

    def nudged(self: MixtureOfExperts, x_ND: torch.Tensor) -> torch.Tensor:
        return plain(self, x_ND.flip(1))

    monkeypatch.setattr(MixtureOfExperts, "forward", nudged)
    code, report = run(capsys, directory)
    assert code == 1
    assert report["first"]["name"] == "language_model.model.layers.0.feed_forward.router"
    assert report["first"]["rerouted"] > 0.3


def test_nan_is_a_difference() -> None:
    model = small_model.model()
    ids = torch.arange(5)[None]
    clean = trace(model, lambda: model(ids))
    assert first_difference(compare(clean, clean), 0.0) is None
    spoilt = clean | {"language_model.lm_head": clean["language_model.lm_head"] * float("nan")}
    first = first_difference(compare(spoilt, clean), 1.0)
    assert first is not None
    assert first.name == "language_model.lm_head"


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["parity", str(tmp_path / "none")]) == 2
    assert "check the path" in capsys.readouterr().err
    (tmp_path / "params.json").write_text("{}")
    assert bench.main(["parity", str(tmp_path)]) == 2
    assert f"llama4 convert {tmp_path} DST --to hf" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["parity", "tiny", "--against", "nobody"])


def test_what_transformers_raises_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its version, and those that work."""
    directory = small_model.write(tmp_path / "model")

    def broken(*arguments: object, **named: object) -> None:
        raise AttributeError("no attribute 'image_outputs'")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.Llama4ForConditionalGeneration.forward", broken)
        assert bench.main(["parity", str(directory)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"llama4: error: transformers 5\.\d+\.\d+ cannot run .*image_outputs.*tested\n", error)


def test_a_missing_field_of_transformers_5_24_is_added() -> None:
    class Output:
        image_outputs: object

    lacking, complete = Output(), Output()
    complete.image_outputs = "kept"
    for output in (lacking, complete):
        baselines._add_image_outputs(torch.nn.Identity(), (), output)
    assert (lacking.image_outputs, complete.image_outputs) == (None, "kept")
