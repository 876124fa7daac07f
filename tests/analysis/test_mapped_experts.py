"""What a model that is larger than a CPU's memory reads from the disk, by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llama4.analysis import mapped_experts as mapped
from llama4.analysis.planner import Placement, make_placement
from llama4.cli.main import main
from llama4.config import PRESETS

GIB = 2**30
EXPERT = 3 * 5120 * 8192 // 2 + 3 * 5120 * 8192 // 128 * 2
"""Bytes of one of Scout's in int4 with a scale for 128 weights."""


def scout(memory: int, weights: str = "int4") -> Placement:
    return make_placement("scout", PRESETS["scout"](), weights=weights, device_memory=memory)


def test_scout_in_24_gib() -> None:
    """Beside 7 GB that every token needs, and a tenth of a GB of cache and activations, 15 GiB of 46 have room."""
    found = mapped.mapped_experts(scout(24 * GIB), 1024)
    assert found is not None
    assert found.experts == 48 * 16 * EXPERT
    attention, shared, head = 5120 * (2 * 5120 + 2 * 1024), 3 * 5120 * 8192, 2 * 202048 * 5120
    resident = 48 * (attention + shared) * 33 // 64 + head
    assert 0.95 * 24 * GIB - found.room == pytest.approx(resident, rel=0.06)
    missing = 1 - found.room / found.experts
    assert found.token == pytest.approx(48 * EXPERT * missing)
    assert found.prompt == found.experts
    long = mapped.mapped_experts(scout(24 * GIB), 2049)
    assert long is not None and long.prompt == 2 * found.experts


@pytest.mark.parametrize(("memory", "weights"), [(64, "int4"), (6, "int4"), (24, "bf16")])
def test_none_where_all_fits_or_nothing_does(memory: int, weights: str) -> None:
    """What is not quantized is mapped as it is, whatever its size."""
    assert mapped.mapped_experts(scout(memory * GIB, weights), 1024) is None
    assert mapped.mapped_experts(replace(scout(24 * GIB), devices=2, tensor_parallel=2), 1024) is None


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--memory-rate", "30GB/s", "--gemm-rate", "300GFLOP/s", "--disk-rate", "2GB/s"]
    options = ["--device", "cpu", "--device-memory", "24GiB", "--context", "1K", "--weights", "int4"]
    assert main(["plan", "scout", *options, *rates, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    own = facts["mapped_experts"]
    assert own["seconds_per_token"] - facts["seconds_per_token"] == pytest.approx(own["bytes_per_token"] / 2e9)
    assert own["seconds_for_prompt"] == max(facts["seconds_for_prompt"], own["bytes_for_prompt"] / 2e9)
    assert main(["plan", "scout", *options, *rates]) == 0
    assert "have room in memory, the rest is read at 2.00 GB/s" in capsys.readouterr().out
