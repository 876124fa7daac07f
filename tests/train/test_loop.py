"""Runs: they learn, stop, go on, and leave what they should."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llama4.adapters.config import LoraConfig
from llama4.adapters.files import WEIGHTS_FILE, save_adapter
from llama4.api import Llama4
from llama4.cli.main import main
from llama4.errors import ArgumentError, CheckpointError, Llama4Error
from llama4.quantization.int4 import Int4
from llama4.quantization.weight import QuantizedWeight
from llama4.train import Result, TrainingError, TrainingOptions, finetune, loop
from llama4.train.memory import Estimate, check_memory
from llama4.train.output import LOCKED, alone_in
from llama4.train.report import METRICS_FILE, read_metrics
from llama4.train.state import STATE_FILE, fingerprint, read_about
from llama4.train.step import Learnt, learn
from llama4.train.stopping import Stopper
from tests import small_model
from tests.train.test_data import write

SETTINGS: dict[str, Any] = {"steps": 6, "batch_tokens": 60, "learning_rate": 1e-2, "progress": False, "warmup": 1}
LORA = LoraConfig(rank=4, dropout=0.1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("loop") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loop") / "data.jsonl"
    return write(path, *({"prompt": f"say {i}", "completion": f"it is {i % 3}"} for i in range(12)))


def run(directory: Path, data: Path, output: Path, **settings: Any) -> Result:
    return finetune(directory, data, output, **{"lora": LORA, **SETTINGS} | settings)


def test_it_learns_and_the_base_stays(directory: Path, data: Path, tmp_path: Path) -> None:
    llm = Llama4.from_pretrained(directory)
    before = {name: p.clone() for name, p in llm.model.named_parameters()}
    result = finetune(llm, data, tmp_path, eval=data, steps=30, **{k: v for k, v in SETTINGS.items() if k != "steps"})
    assert result.is_finished and result.losses[-1] < 0.5 * result.losses[0]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in llm.model.named_parameters())
    assert not any(module._forward_hooks for module in llm.model.modules())
    losses = dict(result.eval_losses)
    assert losses[30] < losses[0] and set(losses) == {0, *range(3, 31, 3)}
    llm.adapters.add("new", tmp_path)
    llm.set_adapter("new")
    assert llm.chat("say 1", max_new_tokens=8).text.startswith("it is")
    lines = read_metrics(tmp_path)
    assert lines[-1]["finished"] and sum(lines[-1]["expert_shares"].popitem()[1]) == pytest.approx(1)
    assert (tmp_path / "README.md").read_text().count(str(data)) == 1
    assert not (tmp_path / STATE_FILE).exists()


def test_defaults_follow_from_model_and_data(directory: Path, data: Path, tmp_path: Path) -> None:
    """Twelve lines are learnt without a setting; large data are gone through once, in full batches."""
    result = finetune(directory, data, tmp_path, progress=False)
    assert result.losses[-1] < 0.5 * result.losses[0] and 80 < result.of <= 160
    card = (tmp_path / "README.md").read_text()
    assert '"epochs": 9' in card and '"learning_rate": 0.0092' in card  # 5e-4 (2000 / 48)^0.78
    large = TrainingOptions().for_data(5120, 10**7, 900)
    assert (large.batch_tokens, large.learning_rate) == (4096, 2.4e-4)
    assert TrainingOptions(method="full").for_data(5120, 10**7, 900).learning_rate == 2.4e-5
    assert large.for_batches(2442).epochs == 1 and large.for_batches(30).epochs == 4
    given = TrainingOptions(steps=7, batch_tokens=99, learning_rate=1.0)
    assert given.for_data(48, 10, 5).for_batches(1) == given
    assert TrainingOptions().for_data(48, 1600, 300).batch_tokens == 300  # one example, whole


def breaks_off_after(steps: int) -> Callable[..., Learnt]:
    """`learn`, but that a process would have died in one of the steps."""
    left = iter(range(steps))

    def dying(*args: Any, **options: Any) -> Learnt:
        learnt = learn(*args, **options)
        if next(left, None) is None:
            raise KeyboardInterrupt
        return learnt

    return dying


@pytest.mark.parametrize(("method", "states"), [("lora", "float32"), ("full", "float32"), ("full", "int8")])
def test_resumed_is_bit_equal(
    method: str, states: str, directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off between gradients and step, four times."""
    settings: dict[str, Any] = {"method": method, "save_every": 1, "eval": data, "eval_every": 2}
    settings["optimizer_states"] = states
    whole = run(directory, data, tmp_path / "whole", **settings)
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    for steps in (1, 1, 2, 1):
        monkeypatch.setattr(loop, "learn", breaks_off_after(steps))
        with pytest.raises(KeyboardInterrupt):
            run(directory, data, tmp_path / "parts", resume=True, **settings)
    monkeypatch.setattr(loop, "learn", learn)
    parts = run(directory, data, tmp_path / "parts", resume=True, **settings)
    assert parts.losses == whole.losses and parts.eval_losses == whole.eval_losses
    found, wanted = load_file(tmp_path / "parts" / weights), load_file(tmp_path / "whole" / weights)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ArgumentError, match="is finished; there is nothing to resume"):
        run(directory, data, tmp_path / "parts", resume=True, **settings)


def test_ctrl_c_saves(
    directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    def interrupted(*args: Any, **options: Any) -> Any:
        if args[1].lines and not (tmp_path / "was").exists():
            (tmp_path / "was").touch()
            os.kill(os.getpid(), signal.SIGINT)
            assert "stopping after this step" in caplog.text  # at once
        return learn(*args, **options)

    monkeypatch.setattr(loop, "learn", interrupted)
    result = run(directory, data, tmp_path / "out")
    assert (result.steps, result.is_finished) == (1, False) and (tmp_path / "out" / STATE_FILE).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again, whole = run(directory, data, tmp_path / "out", resume=True), run(directory, data, tmp_path / "whole")
    assert again.losses == whole.losses and again.is_finished


def test_resuming_another_run_is_refused(directory: Path, data: Path, tmp_path: Path) -> None:
    stop = Stopper()
    stop.request()
    state = loop.Run(directory, data, None, TrainingOptions(lora=LORA, steps=6), progress=False)
    with state.attached():
        loop._train(state, state.objective(), tmp_path, False, stop)
    different = (
        r"with other batch_tokens \(\d+, now 4096\), learning_rate \(0\.0092, now 1\.0\), .*; resume with the same"
    )
    with pytest.raises(ArgumentError, match=different):
        run(directory, data, tmp_path, resume=True, learning_rate=1.0, batch_tokens=4096)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text(encoding="utf-8").replace("a", "e"), encoding="utf-8")
    with pytest.raises(ArgumentError, match="with other data"):
        run(directory, other, tmp_path, resume=True)
    with pytest.raises(ArgumentError, match="with other held-out data"):
        run(directory, data, tmp_path, resume=True, eval=other)
    (tmp_path / STATE_FILE).write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        run(directory, data, tmp_path, resume=True)


def stopped(model: Path | Llama4, data: Path, output: Path, taken: int = 0, **settings: Any) -> loop.Run:
    """A run of which so many steps were taken."""
    stop = Stopper()
    options = TrainingOptions(**{"lora": LORA, **_options()} | settings)
    state = loop.Run(model, data, None, options, progress=False)
    with pytest.MonkeyPatch.context() as patch, state.attached():
        if taken:
            patch.setattr(loop, "learn", breaks_off_after(taken))
        else:
            stop.request()
        with suppress(KeyboardInterrupt):
            loop._train(state, state.objective(), output, False, stop)
    return state


def test_another_base_is_refused(directory: Path, data: Path, tmp_path: Path) -> None:
    """Also one of the same shapes; not the same one in another dtype, nor a state that does not name its base."""
    stopped(directory, data, tmp_path / "out", steps=1)
    other = small_model.write(tmp_path / "other", seed=1)
    wanted = rf"other base model \({directory}, now {other}\); resume with the same"
    with pytest.raises(ArgumentError, match=wanted):
        run(other, data, tmp_path / "out", resume=True, steps=1)
    llm = Llama4.from_pretrained(directory, progress=False)
    stopped(llm, data, tmp_path / "unnamed", steps=1)
    small_model.layers(llm.model)[-1].self_attn.q_proj.weight.data[0, 0] += 1
    with pytest.raises(ArgumentError, match="with other base model; resume with the same"):
        finetune(llm, data, tmp_path / "unnamed", resume=True, **{"lora": LORA, **SETTINGS, "steps": 1})
    tensors = load_file(tmp_path / "out" / STATE_FILE)
    about = {key: value for key, value in read_about(tmp_path / "out").items() if not key.startswith("base")}
    tensors["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    for name in ("nameless", "wide"):
        shutil.copytree(tmp_path / "out", tmp_path / name)
    save_file(tensors, tmp_path / "nameless" / STATE_FILE)
    assert run(other, data, tmp_path / "nameless", resume=True, steps=1).is_finished
    assert run(directory, data, tmp_path / "wide", resume=True, steps=1, loading={"dtype": "bfloat16"}).is_finished


def test_a_packed_base_is_known_in_every_layout(directory: Path) -> None:
    """That of any CPU's kernels; and a number of one matrix in its first rows is noticed."""
    model = Llama4.from_pretrained(directory, quantization="int8").model
    attention = small_model.layers(model)[0].self_attn
    attention.o_proj = weight = QuantizedWeight.of(torch.randn(48, 64), Int4(32))
    weight.in_kernel_layout = False
    before, parts = fingerprint(model, ()), {name: weight.checkpoint_layout(name) for name in weight.specs}
    assert before != fingerprint(model, ("language_model.model.norm.weight",))
    for is_interleaved in (True, False):
        weight.in_kernel_layout = is_interleaved
        for name, values in parts.items():
            weight.set_part(name, weight.from_checkpoint_layout(name, values).reshape(values.shape))
        assert fingerprint(model, ()) == before
    weight.part("weight_packed").data[0, 3] += 1
    assert fingerprint(model, ()) != before


def test_what_only_pictures_need_takes_no_memory(directory: Path, data: Path, tmp_path: Path) -> None:
    """Without pictures, all weights but the tower have gradients and states, and so it was said; with one, all."""
    state = stopped(directory, data, tmp_path / "out", taken=1, steps=2, save_every=1, method="full")
    tower = {n: p for n, p in state.llm.model.named_parameters() if not n.startswith("language_model.")}
    trained = sum(p.numel() for p in state.llm.model.language_model.parameters())
    assert tower and state.num_trained == trained == sum(p.numel() for p in state.llm.model.parameters()) - sum(
        p.numel() for p in tower.values()
    )
    assert not [name for name in load_file(tmp_path / "out" / STATE_FILE) if "vision" in name or "projector" in name]
    with state.attached():
        assert state.memory(state.objective()).trained == 3 * 4 * trained
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    user = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    seen = write(tmp_path / "seen.jsonl", {"messages": [user, {"role": "assistant", "content": "grey"}]})
    options = TrainingOptions(method="full", steps=1)
    assert tower.keys() < loop.Run(directory, seen, None, options, progress=False).trained.keys()
    adapted = TrainingOptions(lora=LoraConfig(targets=("attention", "vision")), steps=1)
    with_tower, without = (loop.Run(directory, d, None, adapted, progress=False).num_trained for d in (seen, data))
    assert 0 < without < with_tower
    with pytest.raises(ArgumentError, match="has no pictures, so nothing of vision is trained; choose other targets"):
        run(directory, data, tmp_path, lora=LoraConfig(targets=("vision",)))


def test_a_state_that_holds_the_tower_goes_on(directory: Path, data: Path, tmp_path: Path) -> None:
    """As earlier versions wrote it of texts; the steps are the same."""
    settings: dict[str, Any] = {"method": "full", "lora": LoraConfig(), "steps": 2, "save_every": 1}
    whole = run(directory, data, tmp_path / "whole", **settings)
    state = stopped(directory, data, tmp_path / "parts", taken=1, **settings)
    tensors, tower = load_file(tmp_path / "parts" / STATE_FILE), dict(state.llm.model.named_parameters())
    for name in tower.keys() - state.trained.keys():
        tensors[f"parameter:{name}"] = tower[name].detach()
        tensors |= {f"optimizer:{name}.{which}": torch.zeros_like(tower[name]) for which in ("mean", "square")}
    save_file(tensors, tmp_path / "parts" / STATE_FILE)
    parts = run(directory, data, tmp_path / "parts", resume=True, **settings)
    assert parts.losses == whole.losses


@pytest.mark.parametrize("method", ["lora", "full"])
def test_nothing_is_replaced(
    method: str, directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a model, such as the one that is trained, nor an adapter, nor a run, be it finished or stopped."""
    settings = {"method": method, **({} if method == "lora" else {"lora": LoraConfig()})}
    other = "choose another directory, or remove that one first"
    with pytest.raises(CheckpointError, match=f"holds a model already; {other}"):
        run(directory, data, directory, **settings)
    run(directory, data, tmp_path / "done", **settings)
    with pytest.raises(ArgumentError, match=f"done holds a finished run; {other}"):
        run(directory, data, tmp_path / "done", seed=1, **settings)
    (tmp_path / "done" / METRICS_FILE).unlink()
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=rf"done holds an? \w+ already; {other}"):
            run(directory, data, tmp_path / "done", resume=resume, **settings)
    monkeypatch.setattr(loop, "learn", breaks_off_after(2))
    with pytest.raises(KeyboardInterrupt):
        run(directory, data, tmp_path / "part", **settings)
    with pytest.raises(ArgumentError, match=f"part holds a run that was stopped; resume it, or {other}"):
        run(directory, data, tmp_path / "part", **settings)
    monkeypatch.setattr(loop, "learn", learn)
    assert run(directory, data, tmp_path / "part", resume=True, **settings).is_finished


def test_killed_before_the_first_step(
    directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter is there only with the state of its run; what was evaluated is evaluated once."""

    def saved(*arguments: Any, **options: Any) -> None:
        save_adapter(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_adapter", saved)
    with pytest.raises(KeyboardInterrupt):
        run(directory, data, tmp_path, eval=data)
    assert read_about(tmp_path)["step"] == 0 and (tmp_path / WEIGHTS_FILE).exists()
    monkeypatch.setattr(loop, "save_adapter", save_adapter)
    result = run(directory, data, tmp_path, eval=data, resume=True)
    assert result.is_finished and [step for step, _ in result.eval_losses] == [0, 1, 2, 3, 4, 5, 6]


def test_one_run_at_a_time(directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is refused, before its model is loaded and behind that; what it has written is left alone."""
    refused: list[str] = []

    def learning(*args: Any, **options: Any) -> Learnt:
        before = read_metrics(tmp_path / "out")
        for resume in (True, False):
            with pytest.raises(CheckpointError, match=r"process \d+ .* is training .*out; wait for it, or stop it"):
                run(tmp_path / "not read", data, tmp_path / "out", resume=resume)
            with pytest.raises(CheckpointError, match="is training"), alone_in(tmp_path / "out", resume):
                refused.append("not")
        assert read_metrics(tmp_path / "out") == before
        return learn(*args, **options)

    monkeypatch.setattr(loop, "learn", learning)
    assert run(directory, data, tmp_path / "out", eval=data, eval_every=2).is_finished and not refused
    assert not (tmp_path / "out" / LOCKED).exists()


def test_a_state_with_nothing_left_to_do(directory: Path, data: Path, tmp_path: Path) -> None:
    stop = Stopper()
    stop.request()
    state = loop.Run(directory, data, None, TrainingOptions(lora=LORA, **_options()), progress=False)
    with state.attached():
        loop._train(state, state.objective(), tmp_path, False, stop)
    tensors = load_file(tmp_path / STATE_FILE)
    about = json.loads(tensors["about"].numpy().tobytes())
    tensors["about"] = torch.frombuffer(bytearray(json.dumps({**about, "step": 6}).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match="says that 6 of 6 steps are taken; start anew"):
        run(directory, data, tmp_path, resume=True)


def _options() -> dict[str, Any]:
    return {name: value for name, value in SETTINGS.items() if name != "progress"}


def test_a_loss_that_is_no_number_stops_with_its_lines(directory: Path, data: Path, tmp_path: Path) -> None:
    llm = Llama4.from_pretrained(directory)
    small_model.layers(llm.model)[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"at step 1 the loss is nan .* on lines \d+.* of .*data\.jsonl"):
        finetune(llm, data, tmp_path, **SETTINGS)


def test_the_best_is_kept(directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is of the step with the least loss, as a run has it that ends there."""
    losses = iter([5.0, 4.0, 1.0, 3.0, 2.0, 1.0, 2.0])
    run(directory, data, tmp_path / "short", steps=2, schedule="constant")
    monkeypatch.setattr(loop, "evaluate", lambda *args: {"loss": next(losses)})
    run(directory, data, tmp_path / "long", schedule="constant", eval=data, eval_every=1)
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("long", "short"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_loss_on_held_out_data_that_is_no_number(
    directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run ends well of which nothing is written."""
    monkeypatch.setattr(loop, "evaluate", lambda *args: {"loss": float("nan")})
    with pytest.raises(TrainingError, match="after step 0 the loss on held-out data is nan"):
        run(directory, data, tmp_path, eval=data)


def test_a_base_is_packed_while_it_is_loaded(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model need not fit into memory; and one that is packed stays as it is."""
    loaded, packed = [], tmp_path / "packed"
    Llama4.from_pretrained(directory, quantization="int8").save_pretrained(packed)
    monkeypatch.setattr(Llama4, "from_pretrained", lambda name, **options: loaded.append(options["quantization"]))
    for place in (directory, packed):
        loop.load_base(place, "qlora", progress=False)
    assert loaded == ["int4", None]


@pytest.mark.parametrize("settings", [{"method": "qlora"}, {"gradient_checkpointing": True}, {"balance": 0.1}])
def test_ways_of_training(settings: dict[str, Any], directory: Path, data: Path, tmp_path: Path) -> None:
    llm: Any = directory
    if settings.get("method") == "qlora":
        llm = Llama4.from_pretrained(directory, quantization="int8")
        packed = {n: p.clone() for n, p in llm.model.named_parameters() if not p.is_floating_point()}
    plain = run(directory, data, tmp_path / "plain")
    result = finetune(llm, data, tmp_path / "out", **{"lora": LORA, **SETTINGS} | settings)
    assert result.losses[-1] < result.losses[0]
    if "gradient_checkpointing" in settings:
        assert result.losses == pytest.approx(plain.losses, rel=1e-4)
    if "balance" in settings:
        assert read_metrics(tmp_path / "out")[3]["router_loss"] > 0
    if "method" in settings:
        assert all(torch.equal(dict(llm.model.named_parameters())[name], values) for name, values in packed.items())


def test_methods_that_do_not_fit(directory: Path, data: Path, tmp_path: Path) -> None:
    packed = Llama4.from_pretrained(directory, quantization="int8")
    with pytest.raises(ArgumentError, match="packed weights are not trained; use method 'qlora'"):
        finetune(packed, data, tmp_path, method="full", steps=1)
    with pytest.raises(ArgumentError, match=r"float16 weights are not trained: .* dtype='bfloat16' or 'float32'"):
        finetune(directory, data, tmp_path, method="full", steps=1, loading={"dtype": "float16"})
    with pytest.raises(ArgumentError, match="method is 'sft'; choose one of lora, qlora, full, dpo, distill"):
        finetune(directory, data, tmp_path, method="sft")
    wrong: dict[str, Any] = {"batch_tokens": 1, "learning_rate": -1.0, "steps": 0, "clip": float("nan")}
    for name, value in wrong.items():
        with pytest.raises(ArgumentError, match=f"{name} is"):
            TrainingOptions(**{name: value})
    with pytest.raises(ArgumentError, match="epochs and steps both"):
        TrainingOptions(epochs=1, steps=1)
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(ArgumentError, match="holds preferences"):
        finetune(directory, pairs, tmp_path)


def test_a_trained_model_has_a_card_and_a_curve(directory: Path, data: Path, tmp_path: Path) -> None:
    """The card is the model's own, with a section of what was run last."""
    for base, output, steps in ((directory, tmp_path / "first", 1), (tmp_path / "first", tmp_path / "out", 2)):
        finetune(base, data, output, method="full", **SETTINGS | {"steps": steps})
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and card.count("## How it was trained") == 1
    assert hashlib.sha256(data.read_bytes()).hexdigest() in card and ": 2 steps" in card and '"method": "full"' in card
    assert (tmp_path / "out" / "loss.png").exists() == bool(find_spec("matplotlib"))


def test_a_card_of_a_user_stays(directory: Path, data: Path, tmp_path: Path) -> None:
    text = "# Mine\n\n## How it was trained\n\nBy hand.\n"
    (tmp_path / "README.md").write_text(text)
    run(directory, data, tmp_path, steps=1)
    assert (tmp_path / "README.md").read_text() == text


def test_what_a_user_adds_to_a_card_stays(directory: Path, data: Path, tmp_path: Path) -> None:
    """Before and behind what a run wrote there, which the next one replaces."""
    card = tmp_path / "README.md"
    run(directory, data, tmp_path, steps=1)
    written = card.read_text().replace("\n## How", "\nFor poems.\n\n## How")
    card.write_text(written + "\n## Licence\n\nMIT\n")
    for name in (METRICS_FILE, WEIGHTS_FILE):
        (tmp_path / name).unlink()
    run(directory, data, tmp_path, steps=2)
    text = card.read_text()
    assert "For poems.\n" in text and "## Licence\n\nMIT\n" in text
    assert text.count("## How it was trained") == text.count("# An adapter for") == text.count("from_pretrained") == 1
    assert ": 2 steps" in text and ": 1 steps" not in text


def test_too_little_memory_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama4.train.memory.available_bytes", lambda device: 1 << 20)
    with pytest.raises(Llama4Error, match=r"training takes 3\.0 MiB beyond .* 1\.0 MiB are free; take fewer"):
        check_memory(Estimate(1 << 20, 1 << 20, 1 << 20), torch.device("cpu"))
    with pytest.raises(Llama4Error, match=r"training takes 3\.0 MiB beyond"):
        check_memory(Estimate(1 << 20, 0, 0, step=2 << 20), torch.device("cpu"))
    check_memory(Estimate(1 << 20, 0, 0, teacher=1 << 30), torch.device("cpu"))  # it is there already


def test_command(directory: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [str(directory.parent), "--subfolder", directory.name, "--dtype", "float32", "--device", "cpu"]
    common = [*place, "--data", str(data), "--targets", "attention,experts:2", "--batch-tokens", "60"]
    assert main(["finetune", *common, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "⟦it is 0<|eot|>⟧" in shown and "12 examples" in shown and "memory: " in shown
    output, merged = tmp_path / "out", tmp_path / "merged"
    training = ["--output", str(output), "--steps", "2", "--merge", str(merged)]
    assert main(["finetune", *common, *training]) == 0
    written = json.loads((output / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(directory)
    assert written["rank_pattern"] == {
        "feed_forward.experts.gate_up_proj": 2,
        "feed_forward.experts.down_proj": 2,
    }
    assert (merged / "config.json").exists() and (output / METRICS_FILE).exists()
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    cards = [(place / "README.md").read_text() for place in (output, merged)]
    assert all(digest in card and '"rank": 16' in card for card in cards)
    assert "library_name: peft" in cards[0] and "library_name: transformers" in cards[1]
    assert "2 steps, loss" in capsys.readouterr().err
    adapted = ["generate", "hello", "--model", str(directory), "--adapter", str(output), "--max-new-tokens", "3"]
    assert main(adapted) == 0
    capsys.readouterr()
    assert main(["finetune", *common, "--output", str(output), "--targets", "heads"]) == 2
    assert "'heads' is not known" in capsys.readouterr().err
    assert main(["finetune", *common, "--output", str(data)]) == 2
    assert "data.jsonl is a file, and a run writes into a directory" in capsys.readouterr().err
    assert main(["generate", "hello", "--model", str(directory), "--adapter", str(data.parent)]) == 1
    assert "holds no adapter_config.json, and so no adapter; a run of `llama4 finetune`" in capsys.readouterr().err


def test_an_example_is_shown_with_its_pictures_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is more than a token in UTF-8 as it is."""
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    user = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "日本?"}]}
    path = write(tmp_path / "data.jsonl", {"messages": [user, {"role": "assistant", "content": "日本."}]})
    assert main(["finetune", "tiny", "--data", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("<|patch|>") == len(re.findall(r"<\|patch\|> x \d+ <", shown)) > 0
    assert "日本?<|eot|>" in shown and "⟦日本.<|eot|>⟧" in shown
