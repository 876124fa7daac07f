"""Rates of this CPU: solved from times that are known, and measured."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llama4.analysis import costs
from llama4.analysis.hardware import Rates
from llama4.analysis.planner import make_deployment
from llama4.bench import calibration
from llama4.bench.calibration import NEAR, PIECES, STEPS, build, measure_rates, probe
from llama4.cli.main import main
from llama4.families import PRESETS
from llama4.families.names import EMBEDDING, HEAD
from llama4.model.multimodal import Llama4Model
from tests import small_model


@pytest.mark.parametrize("name", ["scout", "maverick", "guard4", "tiny", "llama-3.2-1b"])
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_rates_are_found_again(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known rates takes known times; what is solved from these are its rates."""
    truth = Rates(20e9, 7e9, 300e9, 90e9, "")

    def seconds(model: Llama4Model, piece: int, cache_dtype: str) -> list[float]:
        text, plan = probed
        weight = costs.weight_bytes_read(text, plan) / truth.memory
        cached = [
            costs.cache_bytes_read(text, n + STEPS // 2, "bfloat16", cache_dtype) / truth.cache
            for n in (NEAR, piece * PIECES)
        ]
        flops = costs.parameter_flops(text)
        head = flops[EMBEDDING if text.tie_word_embeddings else HEAD]  # of the last token alone
        products = (piece * (sum(flops.values()) - head) + head) / truth.products
        ends = [costs.attention_flops(text, piece * i) / truth.attention for i in range(PIECES + 1)]
        pieces = [products + after - before for before, after in pairwise(ends)]
        return [weight + cached[0], weight + cached[1], *pieces]

    setup = make_deployment(PRESETS[name](), weights=weights, cache_dtype="int8")
    probed = probe(setup.config.text, setup.plan)
    monkeypatch.setattr(calibration, "build", lambda config, plan: None)
    monkeypatch.setattr(calibration, "_pass", seconds)
    found = measure_rates(setup)
    for rate in ("memory", "cache", "products", "attention"):
        assert getattr(found, rate) == pytest.approx(getattr(truth, rate), rel=1e-6), rate
    assert "measured" in found.source


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("scout", "bf16"),
        ("scout", "int4"),
        ("scout", "fp8_mixed"),
        ("maverick", "fp8_mixed"),
        ("guard4", "int8"),
        ("tiny", "fp8_mixed"),
    ],
)
def test_a_probe_is_the_end_of_a_model(name: str, weights: str) -> None:
    """Its layers have the kinds and formats of the last ones, and it is no larger than it should be."""
    setup = make_deployment(PRESETS[name](), weights=weights)
    whole, (small, plan) = setup.config.text, probe(setup.config.text, setup.plan)
    shift = whole.num_hidden_layers - small.num_hidden_layers
    assert small.num_parameters() <= (
        calibration.PROBE_PARAMETERS if small.num_hidden_layers > 1 else calibration.MOST_PARAMETERS
    )
    for i in range(small.num_hidden_layers):
        assert (small.window(i), small.uses_rope(i)) == (whole.window(i + shift), whole.uses_rope(i + shift))
        assert small.uses_experts(i) == whole.uses_experts(i + shift)
    for parameter in costs.parameter_shapes(small):
        original = re.sub(r"layers\.(\d+)", lambda match: f"layers.{int(match[1]) + shift}", parameter)
        assert plan.get(parameter) == setup.plan.get(original)


def test_a_layer_that_is_too_large_to_try() -> None:
    with pytest.raises(ValueError, match="--memory-rate"):
        probe(PRESETS["behemoth"]().text, {})


@pytest.mark.parametrize("weights", ["bf16", "int4", "fp8", "int8"])
@torch.inference_mode()
def test_a_probe_computes_with_numbers(weights: str) -> None:
    """Random weights of any format give logits that are numbers, and tokens go to several experts."""
    setup = make_deployment(PRESETS["tiny"](), weights=weights)
    model = build(setup.config, setup.plan)
    sent: list[int] = []
    experts = small_model.layers(model)[0].feed_forward.experts
    experts.register_forward_pre_hook(lambda _, inputs: sent.extend(inputs[1].tolist()))
    logits = model(torch.arange(256)[None])
    assert logits.isfinite().all() and logits.std() > 0
    assert sum(count > 0 for count in sent) >= 4


def test_a_plan_beside_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The times depend on who else is on the machine; the bytes do not."""
    directory, text = small_model.write(tmp_path / "model"), small_model.config().text
    assert main(["plan", str(directory), "--context", "300", "--cache", "int8", "--measure", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["measured"]["cache_bytes"] == costs.cache_bytes(text, 300, "float32", "int8")
    assert all(facts["measured"][key] > 0 for key in ("bytes", "own_bytes", "seconds_per_token", "seconds_for_prompt"))
    assert all(0 < facts["rates"][key] < math.inf for key in ("memory", "cache", "products", "attention"))
    assert "measured" in facts["rates"]["source"]
