"""Metrics for TensorBoard and Weights & Biases: what their packages are called with."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama4.cli.main import main
from llama4.errors import ArgumentError, Llama4Error
from llama4.train import finetune, loop
from llama4.train.report import read_metrics
from llama4.train.step import learn
from tests import small_model
from tests.train.test_data import write
from tests.train.test_loop import SETTINGS, breaks_off_after

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Both packages, as far as they are called, and what they were called with."""
    found: Calls = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            found.append(("tensorboard", Path(folder), purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            found.append((name, value, step))

        def close(self) -> None:
            found.append(("close",))

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            found.append((values, step))

        def finish(self) -> None:
            found.append(("finish",))

    def init(**options: Any) -> Run:
        found.append(("wandb", options))
        return Run()

    for name in ("tensorboard", "wandb"):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=SimpleNamespace()))
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", *({"prompt": f"say {i}", "completion": "it is"} for i in range(8)))


def test_both_get_what_the_metrics_have(
    data: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, output = small_model.write(tmp_path / "model"), tmp_path / "out"
    options: dict[str, Any] = SETTINGS | {"steps": 3, "report_to": ["tensorboard", "wandb"], "eval": data}
    monkeypatch.setattr(loop, "learn", breaks_off_after(2))
    with pytest.raises(KeyboardInterrupt):
        finetune(directory, data, output, **options, save_every=1)
    assert calls[0] == ("tensorboard", output / "tensorboard", 1) and calls[-2:] == [("close",), ("finish",)]
    started = calls[1][1]
    assert (started["project"], started["group"], started["dir"]) == ("llama4", "out", str(output))
    assert started["config"]["learning_rate"] == 1e-2
    calls.clear()
    monkeypatch.setattr(loop, "learn", learn)
    finetune(directory, data, output, **options, save_every=1, resume=True)
    assert calls[0] == ("tensorboard", output / "tensorboard", 3)  # steps 1 and 2 are there
    lines = {line["step"]: line for line in read_metrics(output) if "loss" in line}
    assert ("loss", lines[3]["loss"], 3) in calls and ("gradient_norm", lines[3]["gradient_norm"], 3) in calls
    logged = [call for call in calls if isinstance(call[0], dict) and "loss" in call[0]]
    assert logged == [({name: value for name, value in lines[3].items() if name != "step"}, 3)]
    assert any("eval_loss" in call[0] for call in calls if isinstance(call[0], dict))


def test_what_is_not_installed_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("llama4.train.trackers.find_spec", lambda name: None)
    command = ["finetune", "nowhere", "--data", str(data), "--output", str(tmp_path / "out"), "--report-to"]
    assert main([*command, "wandb"]) == 2
    assert "report_to 'wandb' needs its package, which is not here: pip install wandb" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="report_to is 'mlflow'; choose of tensorboard, wandb"):
        finetune("nowhere", data, tmp_path / "out", report_to="mlflow")
    assert not (tmp_path / "out").exists()


def test_one_that_does_not_start(data: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that did are closed."""

    def init(**options: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(Llama4Error, match="report_to 'wandb' does not start: no API key"):
        finetune(small_model.write(tmp_path / "model"), data, tmp_path / "out", report_to=["tensorboard", "wandb"])
    assert calls[-1] == ("close",)


def test_one_that_fails_stops_no_training(
    data: Path, tmp_path: Path, calls: Calls, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets nothing more, and is closed; the other gets all."""

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((values, step))
            raise ConnectionError("no network")

        def finish(self) -> None:
            calls.append(("finish",))

    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **options: Run())
    options: dict[str, Any] = SETTINGS | {"steps": 3, "report_to": ["wandb", "tensorboard"]}
    finetune(small_model.write(tmp_path / "model"), data, tmp_path / "out", **options)
    assert sum(isinstance(call[0], dict) for call in calls) == 1 and calls.count(("finish",)) == 1
    assert [call[2] for call in calls if call[0] == "loss"] == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records if "report_to" in record.getMessage()] == [
        "report_to: WeightsAndBiases gets no more metrics: no network"
    ]
