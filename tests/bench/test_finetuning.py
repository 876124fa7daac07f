"""`llama4 bench finetune` on a tiny shape, beside transformers and PEFT."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llama4.bench import finetuning
from llama4.bench.__main__ import main
from llama4.bench.make import MODELS
from llama4.bench.peak_rates import PeakRates
from tests import small_model


class Probe:
    def __init__(self, *arguments: object) -> None: ...

    def measure(self) -> PeakRates:
        return PeakRates(memory=1e9, gemm=1e9)


def test_a_step_beside_peft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(small_model.config(), vision=None)
    monkeypatch.setitem(MODELS, "tiny", lambda: tiny)
    monkeypatch.setattr(finetuning, "PeakProbe", Probe)
    command = ["finetune", "tiny", "--layers", "2", "--rows", "2", "--length", "16", "--rank", "4", "--rounds", "1"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["engines"]) == {"llama4", "transformers and PEFT"} and report["layers"] == 2
    for figures in report["engines"].values():
        seconds = figures["seconds"]["median"]
        assert figures["tokens_per_second"] == pytest.approx(32 / seconds)
        assert figures["peak_share"] == pytest.approx(report["flops"] / seconds / 1e9)
        assert figures["peak_bytes"] >= figures["bytes_before"] > 0
    table = finetuning.tables(report)
    assert "transformers and PEFT" in table and "2 x 16 tokens" in table
