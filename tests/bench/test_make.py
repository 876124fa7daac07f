"""Models with random weights, to measure with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Llama4ForConditionalGeneration

from llama4 import Llama4
from llama4.bench import make
from llama4.bench.__main__ import main
from llama4.config import PRESETS, Llama4Config

SIZE = 4096


def narrow() -> Llama4Config:
    """Of the embedded model's widths, two layers, and a vocabulary with all of Llama 4's special tokens."""
    config = PRESETS["tiny"]()
    text = replace(config.text, num_hidden_layers=2, moe_layers=None, layer_types=None, no_rope_layers=None)
    return replace(config, text=replace(text, vocab_size=SIZE))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(make.MODELS, "small", narrow)
    assert main(["make", "small", str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def test_transformers_runs_it(model: Path) -> None:
    theirs = Llama4ForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    llm = Llama4.from_pretrained(model, dtype="float32", progress=False)
    assert sum(p.numel() for p in theirs.parameters()) == llm.config.num_parameters()
    ids_BT = torch.tensor([llm.tokenizer.encode("A cat, ein Hund; 猫 🙂\n\n  42")])
    with torch.inference_mode():
        logits = theirs(ids_BT).logits
        assert (llm.model(ids_BT) - logits).abs().max() < 1e-4
    assert logits.std() > 0.1, "nothing has died out on the way"
    assert ids_BT[0].tolist() == AutoTokenizer.from_pretrained(model).encode(
        "A cat, ein Hund; 猫 🙂\n\n  42", add_special_tokens=False
    )


def test_weights_are_random(model: Path) -> None:
    state = Llama4.from_pretrained(model, dtype="float32", progress=False).model.state_dict()
    for name, weight in state.items():
        if weight.ndim > 1:
            rows = weight.flatten(0, -2)[:64]
            angles = torch.nn.functional.cosine_similarity(rows[:-1], rows[1:])
            assert angles.abs().max() < 0.5, f"{name} has rows that look alike"


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
def test_packed(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of about the size of what is not packed, and computed without being unpacked."""
    monkeypatch.setitem(make.MODELS, "small", narrow)
    assert main(["make", "small", str(tmp_path / "packed"), "--quantization", scheme]) == 0
    llm = Llama4.from_pretrained(tmp_path / "packed", progress=False)
    packed = {name for name, part in llm.model.named_parameters() if name.endswith("weight_scale")}
    assert len(packed) == 2 * 9  # two layers: q, k, v, o, gate, up and down of the shared expert, two stacks
    ids_BT = torch.tensor([[5, 900, 31, 77]])
    logits = llm.model(ids_BT)
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10


def test_every_shape_has_its_parameters() -> None:
    assert (make.small().num_parameters(), make.mav().num_parameters()) == (947_063_296, 959_777_280)
    assert [make.MODELS[name]().num_parameters() for name in ("scout", "maverick")] == [
        PRESETS[name]().num_parameters() for name in ("scout", "maverick")
    ]
    tokens = make.vocabulary(200_000)
    assert len(set(tokens)) == 200_000


def test_target_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["make", "small", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_more_layers_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make", "small", str(tmp_path / "model"), "--layers", "9"]) == 2
    assert "small has 8 layers" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
