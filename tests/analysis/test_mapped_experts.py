"""What a model that is larger than a CPU's memory reads from the disk, by hand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from llama4.analysis import mapped_experts as mapped
from llama4.analysis import planner
from llama4.analysis.hardware import Rates
from llama4.analysis.planner import Deployment, make_deployment
from llama4.bench import calibration
from llama4.cli.main import main
from llama4.config import PRESETS

GIB = 2**30
EXPERT = 3 * 5120 * 8192 // 2 + 3 * 5120 * 8192 // 128 * 2
"""Bytes of one of Scout's in int4 with a scale for 128 weights."""


def scout(memory: int, weights: str = "int4") -> Deployment:
    return make_deployment(PRESETS["scout"](), weights=weights, device_memory=memory, device_type="cpu")


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


def test_maverick_in_24_gib() -> None:
    """A token needs 1 of 128 experts in each of 24 layers, and few of them have room."""
    maverick = PRESETS["maverick"]()
    deployment = make_deployment(maverick, weights="int4", device_memory=24 * GIB, device_type="cpu")
    found = mapped.mapped_experts(deployment, 1024)
    assert found is not None
    assert found.experts == 24 * 128 * EXPERT
    assert 0 < found.room < 24 * GIB
    assert found.token == pytest.approx(24 * EXPERT * (1 - found.room / found.experts))


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_none_where_all_else_does_not_fit(name: str) -> None:
    deployment = make_deployment(PRESETS[name](), weights="int4", device_memory=4 * GIB, device_type="cpu")
    assert mapped.mapped_experts(deployment, 1024) is None


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


def test_the_plan_beside_what_is_measured() -> None:
    """Of a model whose experts stay in files the plan is that with the disk, and memory is without the files' pages."""
    mine = scout(24 * GIB)
    facts = planner.describe("scout", mine, 1024, Rates(30e9, 30e9, 3e11, 3e11, "given"))
    found = mapped.mapped_experts(mine, 1024)
    assert found is not None
    facts["mapped_experts"] = own = mapped.describe(found, facts, 1e9)
    facts["measured"] = {
        "cache_bytes": 1.0,
        "bytes": 1.0,
        "own_bytes": own["own_bytes"] / 2,
        "bytes_per_token": own["bytes_per_token"] / 4,
        "seconds_per_token": own["seconds_per_token"] / 8,
        "seconds_for_prompt": own["seconds_for_prompt"] / 16,
        "others": None,
    }
    ratios = {line[:18].strip(): line.split()[-1] for line in calibration.comparison(facts, mine).splitlines()}
    wanted = {"memory": "2.00", "read for a token": "4.00", "time per token": "8.00", "the whole prompt": "16.00"}
    assert wanted.items() <= ratios.items()


def test_a_directory_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the disk nothing can be measured, and nothing is said."""
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["scout"]().to_dict()))
    rates = ["--memory-rate", "30GB/s", "--gemm-rate", "300GFLOP/s"]
    options = ["--device", "cpu", "--device-memory", "24GiB", "--context", "1K", "--weights", "int4"]
    assert main(["plan", str(tmp_path), *options, *rates, "--json"]) == 0
    assert "mapped_experts" not in json.loads(capsys.readouterr().out)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system drops no pages of a file")
def test_the_rate_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration.disk_rate(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(bytes(8192))
    assert calibration.disk_rate(tmp_path) is None
    monkeypatch.setattr(calibration, "DISK_RUN", 4096)
    rate = calibration.disk_rate(tmp_path)
    assert rate is not None and rate > 0
    monkeypatch.delattr(os, "posix_fadvise")
    assert calibration.disk_rate(tmp_path) is None


def test_the_rate_of_a_disk_is_of_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "scout", "--disk-rate", "2GB/s"])
    assert "--disk-rate is of a model larger than this CPU's memory; add --device cpu" in capsys.readouterr().err
