"""The bench of quantization schemes, on a small random model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from llama4.bench import rounding_errors
from llama4.bench.__main__ import main
from llama4.bench.absmax_rounding import round_to_absmax
from llama4.bench.quantization import Row, _answers, table
from llama4.quantization import int4
from llama4.tiny.shapes_dataset import KINDS_OF_QUESTION
from tests.parity.references import reference_config, reference_model


def test_schemes_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """int4 is smaller; plain rounding is as small and further from the truth, which is what is not quantized."""
    directory = tmp_path / "model"
    reference_model(reference_config(head_dim=32), 3).bfloat16().save_pretrained(directory)
    arguments = ["quantization", "--model", str(directory), "--prompt", "64", "--reply", "2", "--threads", "1"]
    assert main([*arguments, "--schemes", "int4", "--plain", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    none, ours, plain = printed["schemes"]
    assert (none["scheme"], none["divergence"], none["asked"]) == ("none", 0.0, 0)
    assert none["bytes_on_disk"] == (directory / "model.safetensors").stat().st_size
    assert (ours["scheme"], plain["scheme"]) == ("int4", "int4 plain")
    assert ours["bytes_on_disk"] == plain["bytes_on_disk"] < none["bytes_on_disk"]
    assert 0 < ours["divergence"] < plain["divergence"]
    assert all(row["prefill"] > 0 and row["decode"] > 0 and row["perplexity"] > 1 for row in printed["schemes"])
    assert printed["errors"].keys() == rounding_errors.measure().keys()
    with pytest.raises(SystemExit):
        main([*arguments, "--reply", "0"])


def test_plain_rounding_is_to_the_largest_weight() -> None:
    """By compressed-tensors, and by its rule; in float32 both give the same codes and scales."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    parts = round_to_absmax(weight, int4.Int4(32))
    groups = weight.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    codes = (groups / scale).round().clamp(-8, 7).flatten(-2).to(torch.int8)
    assert torch.equal(int4.unpack(parts["weight_packed"]), codes)
    assert torch.allclose(parts["weight_scale"], scale.squeeze(-1), rtol=1e-6)


def test_ours_is_closer_than_plain_whatever_the_distribution() -> None:
    for name, errors in rounding_errors.measure().items():
        for format, (ours, plain) in errors.items():
            assert ours < (0.89 if "int4" in format else 1.001) * plain, (name, format)


def test_plain_rounding_wants_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    assert main(["quantization", "--plain"]) == 1
    assert "pip install compressed-tensors" in capsys.readouterr().err


def test_answers_are_what_is_compared() -> None:
    """The logits of a reply are those before each of its tokens, in a batch as alone."""
    from llama4.api import Llama4
    from llama4.bench.vqa import exam

    llm = Llama4.from_pretrained("tiny")
    with torch.inference_mode():
        logits, targets = _answers(llm, 2)
        messages, question = next(exam(KINDS_OF_QUESTION[0], 1, seed=1))
        whole = llm.processor(
            [*messages, {"role": "assistant", "content": question.answer}], add_generation_prompt=False
        )
        alone = llm.model(whole.input_ids, pixel_values=whole.pixel_values)[0]
    length = whole.input_ids.shape[1] - llm.processor(messages).input_ids.shape[1]
    assert torch.equal(targets[:length], whole.input_ids[0, -length:])
    assert torch.allclose(logits[:length], alone[-length - 1 : -1], atol=1e-4)
    ends = targets == llm.tokenizer.special("<|eot|>")
    assert ends.sum() == 2 * len(KINDS_OF_QUESTION), "each ends with the end of a turn"
    assert (logits.argmax(-1) == targets).float().mean() > 0.7, "the model knows most of them"


def test_the_table_has_a_line_per_kind() -> None:
    rows = [
        Row("none", 10, 1, 1, 1, 1.5, 0.0, 3, 4, {"count": 1, "shape": 2}),
        Row("int4", 5, 1, 1, 1, 1.6, 0.1, 2, 4, {"count": 0, "shape": 2}),
    ]
    lines = [line.split() for line in table(rows).splitlines()]
    assert ["count", "50.0%", "0.0%"] in lines
    assert ["shape", "100.0%", "100.0%"] in lines
    assert lines[2][-8:] == ["1.6", "0.10000", "50.00%", "of", "4", "(15.0%", "...", "85.0%)"]
