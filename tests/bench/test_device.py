"""`llama4 bench device` without a device: every step runs on a CPU, and one that goes wrong leaves the others alone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4.bench.device import kernels, report, workload
from llama4.bench.device.plan import PLAN, Step
from llama4.bench.device.record import NO_TIME
from llama4.bench.device.runner import Result, Runner
from llama4.kernels.triton import launch_products
from llama4.ops import quantized_gpu
from llama4.ops.linear import linears

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _children_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed llama4 stays the first."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])


def results_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))["steps"]
    return content


def test_dry_run(tmp_path: Path) -> None:
    """Every step, on small shapes, from a directory without anything."""
    command = [sys.executable, "-m", "llama4.bench", "device", "--dry-run", "--minutes", "20", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    steps = results_of(tmp_path)
    failed = [(name, case) for name, step in steps.items() for case in step["cases"] if case["state"] == "failed"]
    assert (done.returncode, failed, done.stderr) == (0, [], "")
    assert [*steps] == [step.name for step in PLAN]
    for name, step in steps.items():
        assert step["state"] == "done", name
        assert name == "kernels" or any(case["state"] == "done" for case in step["cases"]), name
        assert not step["restarts"]
    assert {name for name, step in steps.items() if step["profiles"]} == {"scout-4", "scout-48", "experts", "vision"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8") + "\n" == done.stdout
    assert "## scout-4: int4: prompt of 96" in (tmp_path / "profiles.md").read_text(encoding="utf-8")
    layers = json.loads((tmp_path / "experts.json").read_text(encoding="utf-8"))["layers"]
    assert [layer["experts"] for layer in layers] == [4, 32]
    for layer in layers:
        assert {*layer["milliseconds"]} == {"loop", "grouped", "int4", "int8", "fp8"}
        assert {*layer["fastest"]} == {"1", "4", "32"}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8, "some machines give no more files back"


def run(out: Path, *names: str, seconds: float = 300, case_seconds: float = 100, minutes: float = 10) -> dict[str, Any]:
    """Steps of device_faults."""
    steps = [Step(name, f"tests.bench.device_faults:{name}", name, seconds, case_seconds) for name in names]
    told = report.Report(out, {})
    Runner(steps, device="cpu", minutes=minutes, dry=True, log=out / "log.txt", out=out, report=told).run()
    return results_of(out)


def cases(step: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {case["case"]: (case["state"], case.get("reason", "")) for case in step["cases"]}


def clock(out: Path, jump: float, most: float) -> SimpleNamespace:
    """Jumps at each look from when "hanging" hangs, so far in all: nobody waits for that, and nothing else is late."""
    child, jumped = out / "child", 0.0

    def monotonic() -> float:
        nonlocal jumped
        if child.exists() and child.read_text(encoding="utf-8"):
            jumped = min(jumped + jump, most)
        return time.monotonic() + jumped

    return SimpleNamespace(monotonic=monotonic)


def test_what_goes_wrong_leaves_the_rest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama4.bench.device.runner.time", clock(tmp_path, 40, 160))
    names = "failing", "hanging", "crashing", "losing_the_device", "broken_outside_of_cases", "fine"
    steps = run(tmp_path, *names)
    assert cases(steps["failing"]) == {
        "broken": ("failed", "RuntimeError: out of luck"),
        "absent": ("skipped", "is not there"),
        "behind": ("done", ""),
    }
    assert cases(steps["hanging"]) == {
        "before": ("done", ""),
        "hangs": ("failed", "ended after 100 s"),
        "behind": ("done", ""),
    }
    assert cases(steps["crashing"])["crashes"] == ("failed", "the process ended with code -11")
    assert cases(steps["losing_the_device"])["illegal"][0] == "failed"
    for name in ("failing", "hanging", "crashing", "losing_the_device"):
        assert steps[name]["state"] == "done"
        assert cases(steps[name])["behind"] == ("done", "")
        assert steps[name]["restarts"] == (name != "failing")
    assert steps["broken_outside_of_cases"]["state"] == "ended early"
    assert steps["fine"]["state"] == "done"
    assert not is_running(int((tmp_path / "child").read_text())), "what hangs ends with all that it started"
    assert "RuntimeError: no case" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_nothing_survives_the_command(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.bench.test_device import run
if __name__ == "__main__":
    run(Path({str(tmp_path)!r}), "hanging", seconds=60, case_seconds=60)
"""
    (tmp_path / "main.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=environment) as process:
        while not (child := tmp_path / "child").exists() or not child.read_text(encoding="utf-8"):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    end = time.monotonic() + 60
    while is_running(int(child.read_text(encoding="utf-8"))):
        assert time.monotonic() < end, "the step goes on"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("limit", ["step", "everything"])
def test_limits(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By clocks that jump: in "slow" at every case, in the runner when "hanging" hangs."""
    monkeypatch.setattr("llama4.bench.device.runner.time", clock(tmp_path, 10_000, 10_000))
    names = ("slow", "hanging", "fine")
    if limit == "step":
        steps = run(tmp_path, *names, seconds=600, case_seconds=600, minutes=1000)
        assert [steps[name]["state"] for name in names] == ["ended early", "ended early", "done"]
        done = [name for name, (state, _) in cases(steps["slow"]).items() if state == "done"]
        assert 2 <= len(done) < 600
        assert cases(steps["slow"])["999"] == ("skipped", NO_TIME)
    else:
        steps = run(tmp_path, *names[1:], seconds=20_000, case_seconds=20_000, minutes=100)
        assert [steps[name]["state"] for name in names[1:]] == ["ended early", "skipped"]
        assert steps["fine"]["reason"] == NO_TIME
    assert cases(steps["hanging"]) == {"before": ("done", ""), "hangs": ("failed", NO_TIME)}
    assert not is_running(int((tmp_path / "child").read_text(encoding="utf-8")))


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    told = report.Report(tmp_path, {})
    runner = Runner([], device="meta", minutes=1, dry=True, log=tmp_path / "log.txt", out=tmp_path, report=told)
    with pytest.raises(ValueError, match=r"meta cannot be used here: .*; see .*log\.txt"):
        runner.run()


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_kernels_are_compiled_as_they_are_launched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of time with tensors without data, which must be those of the layer in shape and dtype."""
    asked: list[list[Any]] = []

    def product(
        kind: str, x: Tensor, values: Tensor, scales: Tensor, counts: Tensor | None = None, **rest: Any
    ) -> Tensor:
        tensors = [x, values, scales, counts, rest.get("x_scales_R")]
        dtype = rest.get("dtype") or x.dtype
        asked.append([kind, dtype, *((tuple(t.shape), t.dtype) if t is not None else None for t in tensors)])
        return torch.zeros(len(x), scales.shape[-2], dtype=dtype, device=x.device)

    monkeypatch.setattr(launch_products, "product", product)
    monkeypatch.setattr(quantized_gpu, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    text = workload.text_config("scout", layers=1, dry=True)
    experts: Any = workload.moe_layer(text, torch.device("cpu"), kind).experts
    experts(torch.zeros(3, text.hidden_size).bfloat16(), torch.tensor([1, 0, 2, 0]))
    assert all(len(weight.part(weight.format.parts[0]).unique()) > 200 for weight in experts.children())
    launched = asked.copy()
    asked.clear()
    for wanted in kernels._experts(kind, text, 3):
        kernels._ask_for(dataclasses.replace(wanted, group=wanted.group and text.hidden_size))
    assert asked == launched
    assert len({*kernels.products()}) == len([*kernels.products()]) > 100


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_products_with_several_matrices_are_compiled_as_they_are_launched(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a graph's step."""
    asked: list[list[Any]] = []

    def products(kind: str, x: Tensor, matrices: Sequence[tuple[Tensor, Tensor]], **rest: Any) -> Tensor:
        tensors = [x, *(part for matrix in matrices for part in matrix), rest.get("x_scales_R")]
        dtype = rest.get("dtype") or x.dtype
        asked.append([kind, dtype, *((tuple(t.shape), t.dtype) if t is not None else None for t in tensors)])
        return torch.zeros(len(x), sum(len(scales) for _, scales in matrices), dtype=dtype, device=x.device)

    monkeypatch.setattr(launch_products, "products", products)
    monkeypatch.setattr(quantized_gpu, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    text = workload.text_config("scout", layers=1, dry=True)
    model, _ = workload.build(workload.config(text), torch.device("cpu"), kind)
    layer: Any = model.language_model.model.layers[0]
    attention, x = layer.self_attn, torch.zeros(3, text.hidden_size).bfloat16()
    linears((attention.q_proj, attention.k_proj, attention.v_proj), x)
    shared = layer.feed_forward.shared_expert
    linears((shared.gate_proj, shared.up_proj), x)
    launched = asked.copy()
    asked.clear()
    for wanted in kernels._layer(kind, text, 3):
        if wanted.others:
            kernels._ask_for(dataclasses.replace(wanted, group=wanted.group and text.hidden_size))
    assert asked == launched


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own, which launches nothing afterwards."""
    pytest.importorskip("triton")
    code = """
from llama4.bench.device.kernels import Between, Product, compile_one
several = Product("int8", 3, 64, 128, others=(64, 32))
many = Product("int4", 1024, 64, 128, group=64), Product("bfloat16", 3, 64, 128, 4)
for wanted in (Between("swiglu", 3), Product("int8", 3, 64, 128, 4), several, *many, Product("no kind", 3, 64, 128)):
    print(compile_one((wanted, 90)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.startswith(5 * "None\n" + "Product(kind='no kind'")
    assert {path.stem for path in tmp_path.rglob("*.cubin")} == {"gemv", "swiglu", "unpack", "grouped_mm"}


def test_report() -> None:
    """Targets that were seen, cases with the same figures in one table, reasons for what is missing."""
    result = Result(next(step for step in PLAN if step.name == "vision"), "done", seconds=12.3)
    lines: Sequence[dict[str, Any]] = [
        {"case": "tower", "state": "begun"},
        {"case": "tower", "state": "done", "figures": {"ms": 12.345, "share_of_gemm": 0.456}, "peak_bytes": 2**31},
        {"case": "b", "state": "done", "figures": {"other_ms": 1}},
        {"case": "c", "state": "done", "figures": {"ms": 20000.0, "share_of_gemm": None}},
        {"case": "d", "state": "failed", "reason": "why"},
        {"case": "profile: tower", "state": "profile", "kernels": [{"kernel": "k", "ms": 1, "share": 0.5, "calls": 3}]},
    ]
    for line in lines:
        result.read(json.dumps(line))
    text = report.markdown({"card": "none"}, [result])
    assert "| vision | done | 12 | 3 done, 1 failed |  |" in text
    assert "| vision: tower: share of gemm | 50% | 46% |" in text
    assert "| tower | 12.3 | 46% | 2.00 |\n| c | 20,000 |  |  |" in text
    assert "- d: failed: why" in text
    assert "| k | 1.000 | 50.0% | 3 |" in report.profiles([result])
