"""The bench of quantisation schemes, on a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama4.bench.__main__ import main
from tests.parity.references import reference_config, reference_model


def test_schemes_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """int4 is smaller and further from the truth than int8; what is not quantised is the truth."""
    directory = tmp_path / "model"
    reference_model(reference_config(head_dim=32), 3).bfloat16().save_pretrained(directory)
    arguments = ["quantization", "--model", str(directory), "--prompt", "64", "--reply", "2", "--threads", "1"]
    assert main([*arguments, "--schemes", "int8", "int4", "--json"]) == 0
    none, int8, int4 = json.loads(capsys.readouterr().out)
    assert (none["scheme"], none["divergence"], none["asked"]) == ("none", 0.0, 0)
    assert none["bytes_on_disk"] == (directory / "model.safetensors").stat().st_size
    assert int4["bytes_on_disk"] < int8["bytes_on_disk"] < none["bytes_on_disk"]
    assert 0 < int8["divergence"] < int4["divergence"]
    assert all(row["prefill"] > 0 and row["decode"] > 0 and row["perplexity"] > 1 for row in (none, int8, int4))
    with pytest.raises(SystemExit):
        main([*arguments, "--reply", "0"])


def test_answers_are_what_is_compared() -> None:
    """The logits of a reply are those before each of its tokens."""
    from llama4.api import Llama4
    from llama4.bench.quantization import CORE, _answers

    llm = Llama4.from_pretrained("tiny")
    with torch.inference_mode():
        logits, targets = _answers(llm, 1)
    assert len(logits) == len(targets) > 2 * len(CORE)
    assert (targets == llm.tokenizer.special("<|eot|>")).sum() == len(CORE), "each ends with the end of a turn"
    assert (logits.argmax(-1) == targets).float().mean() > 0.7, "the model knows most of them"
