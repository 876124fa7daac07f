"""Losses of preferences and of a teacher, against the same in float64 on all logits."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4.adapters.config import LoraConfig
from llama4.adapters.lora import Adapter
from llama4.api import Llama4
from llama4.cli.main import main
from llama4.errors import ArgumentError, CheckpointError, DiskError
from llama4.model.multimodal import Llama4Model
from llama4.train import finetune
from llama4.train import objectives as objectives_module
from llama4.train import teacher as teaching
from llama4.train.data import Batch, Batches, Dataset, load_dataset
from llama4.train.objectives import Distillation, Preference
from llama4.train.report import read_metrics
from llama4.train.teacher import load_teacher, save_teacher
from tests import small_model
from tests.train.test_data import write

PAIRS = [{"prompt": f"say {i}", "chosen": f"it is {i}" * (1 + i % 3), "rejected": f"no {i}, not it"} for i in range(6)]
SETTINGS: dict[str, Any] = {"steps": 12, "batch_tokens": 160, "learning_rate": 1e-2, "progress": False, "warmup": 1}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama4:
    return Llama4.from_pretrained(small_model.write(tmp_path_factory.mktemp("objectives") / "model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("objectives") / "pairs.jsonl", *PAIRS)


def random_adapter(model: Llama4Model) -> Adapter:
    adapter = Adapter.create(model, LoraConfig(rank=2), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, lora in adapter.items():
            lora.b.normal_(0, 0.1, generator=generator)
    return adapter


def log_probs_of(model: Llama4Model, batch: Batch) -> torch.Tensor:
    """[B, T] float64, 0 where nothing is learnt."""
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).double()
    found = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    return found * batch.is_learnt


# -- preferences -------------------------------------------------------------------------------------------------------


def test_pairs_are_in_one_batch(llm: Llama4, pairs: Path) -> None:
    data = load_dataset(pairs, llm.processor, max_length=99, progress=False)
    batches = Batches(data.examples, llm.processor, 160, 0, data.rejected)
    lengths = [len(one.ids) + len(two.ids) for one, two in zip(data.examples, data.rejected, strict=True)]
    assert data.longest == max(lengths) and data.num_tokens == sum(lengths)
    seen: list[int] = []
    for batch in batches:
        half = len(batch.lines)
        assert len(batch.input_ids) == 2 * half and batch.num_tokens <= 160
        for row, line in enumerate(batch.lines):
            for example, at in ((data.examples[line - 1], row), (data.rejected[line - 1], half + row)):
                assert batch.input_ids[at, : len(example.ids)].tolist() == list(example.ids)
                assert int(batch.is_learnt[at].sum()) == example.num_learnt
        seen += batch.lines
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_preference_losses_against_float64(
    kind: str, llm: Llama4, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row with `math`, and the gradients through all logits."""
    monkeypatch.setattr(objectives_module, "tokens_per_slice", lambda vocab_size: 3)
    model, beta = llm.model, 0.3
    data = load_dataset(pairs, llm.processor, max_length=99, progress=False)
    batch = Batches(data.examples, llm.processor, 4096, None, data.rejected)[0]
    reference = log_probs_of(model, batch).sum(1).tolist()
    adapter = random_adapter(model)
    adapter.attach(model)
    try:
        found = Preference(adapter, beta, kind)(model, batch)
        gradients = torch.autograd.grad(found.total, list(adapter.parameters()))
        policy = log_probs_of(model, batch).sum(1)
        lengths = batch.is_learnt.sum(1).tolist()
        wanted, margins = 0.0, []
        for i in range(6):
            ratios = [policy[row].item() - reference[row] for row in (i, 6 + i)]
            margins.append(beta * (ratios[0] - ratios[1]))
            means = [ratio / lengths[row] for ratio, row in zip(ratios, (i, 6 + i), strict=True)]
            of = {"sigmoid": math.log1p(math.exp(-margins[-1])), "ipo": (means[0] - means[1] - 1 / (2 * beta)) ** 2}
            wanted += of[kind]
        assert found.total.item() == pytest.approx(wanted, rel=1e-5) and found.count == 6
        assert found.values["margin"] == pytest.approx(sum(margins), abs=1e-4)
        assert found.values["accuracy"] == sum(margin > 0 for margin in margins) not in (0, 6)
        assert found.values["chosen_reward"] - found.values["rejected_reward"] == pytest.approx(sum(margins), abs=1e-4)
        ratios_B = policy - torch.tensor(reference, dtype=torch.float64)
        if kind == "ipo":
            ratios_B = ratios_B / torch.tensor(lengths)
        chosen, rejected = ratios_B[:6], ratios_B[6:]
        loss = (
            torch.log1p(torch.exp(-beta * (chosen - rejected)))
            if kind == "sigmoid"
            else (chosen - rejected - 1 / (2 * beta)) ** 2
        )
        for one, other in zip(gradients, torch.autograd.grad(loss.sum(), list(adapter.parameters())), strict=True):
            assert (one - other).abs().max() <= 2e-4 * other.abs().max()
    finally:
        adapter.detach()


def test_dpo_learns_to_prefer(llm: Llama4, pairs: Path, tmp_path: Path) -> None:
    result = finetune(llm, pairs, tmp_path / "out", eval=pairs, method="dpo", lora=LoraConfig(rank=4), **SETTINGS)
    assert result.losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert result.eval_losses[-1][1] < 0.3 and result.values["accuracy"] == 1 and result.values["margin"] > 1
    lines = read_metrics(tmp_path / "out")
    assert lines[0]["eval_accuracy"] == 0 and abs(lines[1]["margin"]) < 1e-5, "sums in another order"
    assert not any(module._forward_hooks for module in llm.model.modules())


def test_dpo_as_a_command(llm: Llama4, pairs: Path, tmp_path: Path, capsys: Any) -> None:
    llm.save_pretrained(tmp_path / "model")
    command = ["finetune", str(tmp_path / "model"), "--data", str(pairs), "--method", "dpo", "--preference", "ipo"]
    assert main([*command, "--output", str(tmp_path / "out"), "--steps", "2", "--beta", "0.2"]) == 0
    assert "accuracy" in capsys.readouterr().err
    of_method = {"--beta": ("1", "dpo"), "--preference": ("ipo", "dpo"), "--soft-weight": ("1", "distill")}
    for option, (value, method) in of_method.items():
        with pytest.raises(SystemExit):
            main(["finetune", "tiny", "--data", str(pairs), "--dry-run", option, value])
        assert f"{option} is of --method {method}; --method lora has none" in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 0
    assert "⟦it is 0<|eot|>⟧" in capsys.readouterr().out


def test_data_and_method_must_fit(llm: Llama4, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"holds preferences .* which method 'dpo' learns from"):
        finetune(llm, pairs, tmp_path / "out")
    other = write(tmp_path / "x.jsonl", {"text": "abc"})
    with pytest.raises(ArgumentError, match="holds no preferences; method 'dpo' needs prompt, chosen and rejected"):
        finetune(llm, other, tmp_path / "out", method="dpo")
    with pytest.raises(ArgumentError, match="beta is 0; it must be more"):
        finetune(llm, pairs, tmp_path / "out", method="dpo", beta=0)
    with pytest.raises(ArgumentError, match="preference is 'kto'; choose one of sigmoid, ipo"):
        finetune(llm, pairs, tmp_path / "out", method="dpo", preference="kto")


# -- teachers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("objectives") / "teacher", seed=5)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("objectives") / "lines.jsonl"
    return write(path, *({"prompt": f"say {i}", "completion": f"it is {i * 3}"} for i in range(9)))


@pytest.mark.parametrize("saved", [False, True])
def test_distillation_against_float64(
    saved: bool, llm: Llama4, teacher: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and its gradients through all logits; of a file, with all tokens that are not in it as one."""
    monkeypatch.setattr(objectives_module, "tokens_per_slice", lambda vocab_size: 4)
    master, model, top, vocabulary = Llama4.from_pretrained(teacher), llm.model, 5, llm.config.text.vocab_size
    data = load_dataset(lines, llm.processor, max_length=99, progress=False)
    source = str(teacher)
    if saved:
        assert save_teacher(master, data, tmp_path / "t.safetensors", top=top, batch_tokens=40) == data_learnt(data)
        source = str(tmp_path / "t.safetensors")
    asked = load_teacher(source, llm, data, progress=False, max_length=99)
    batch = Batches(data.examples, llm.processor, 4096, 3)[0]
    names = ("language_model.model.layers.1.feed_forward.experts.down_proj", "language_model.lm_head.weight")
    weights = [model.get_parameter(name).requires_grad_(True) for name in names]
    found = Distillation(asked, 0.8)(model, batch, 0.25)  # w is 0.6
    gradients = torch.autograd.grad(found.total, weights)
    kept = batch.is_learnt
    q = model(batch.input_ids, attention_mask=batch.attention_mask).double()[kept].log_softmax(-1)
    with torch.no_grad():
        p = master.model(batch.input_ids, attention_mask=batch.attention_mask).double()[kept].log_softmax(-1)
    hard = -q.gather(-1, batch.labels[kept][:, None]).sum()
    if saved:
        ids = p.topk(top).indices
        others = torch.ones(len(p), vocabulary, dtype=torch.bool).scatter(-1, ids, False)
        rest = [(x.exp() * others).sum(-1, keepdim=True).log() for x in (p, q)]
        p, q = (torch.cat([x.gather(-1, ids), r], -1) for x, r in zip((p, q), rest, strict=True))
    soft = (p.exp() * (p - q)).sum()
    wanted = 0.6 * soft + 0.4 * hard
    assert found.count == int(kept.sum()) and found.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found.values["divergence"] == pytest.approx(soft.item(), rel=1e-4)
    assert found.values["cross_entropy"] == pytest.approx(hard.item(), rel=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(wanted, weights), strict=True):
        assert (one - other).abs().max() <= 2e-4 * other.abs().max()
    at_end = Distillation(asked, 0.8)(model, batch, 1.0)
    assert at_end.total.item() == pytest.approx(hard.item(), rel=1e-5) and not at_end.values


def data_learnt(data: Dataset) -> int:
    return sum(example.num_learnt for example in data.examples)


def test_a_student_becomes_like_its_teacher(
    llm: Llama4, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A larger one that has learnt the data itself; from the model, and from its file, which is written once."""
    config = small_model.config()
    large = Llama4Model(replace(config, text=replace(config.text, intermediate_size=64)))
    large.init_weights(torch.Generator().manual_seed(3))
    learning = SETTINGS | {"steps": 40}
    teacher = tmp_path / "teacher"
    taught = finetune(Llama4(large.eval(), llm.tokenizer), lines, teacher, method="full", **learning)
    assert taught.losses[-1] < 0.3
    student = str(small_model.write(tmp_path / "student", seed=1))
    file = str(tmp_path / "teacher.safetensors")
    assert (
        main(
            [
                "teach",
                str(teacher.parent),
                "--subfolder",
                teacher.name,
                "--data",
                str(lines),
                "--output",
                file,
                "--top",
                "64",
            ]
        )
        == 0
    )
    assert "the 64 likeliest of" in capsys.readouterr().err
    settings: dict[str, Any] = learning | {"method": "distill"}
    for name, source in (("model", str(teacher)), ("file", file)):
        result = finetune(student, lines, tmp_path / name, teacher=source, **settings)
        divergences = [line["divergence"] for line in read_metrics(tmp_path / name) if "divergence" in line]
        assert result.is_finished and divergences[-1] < 0.2 * divergences[0], name
        assert result.losses[-1] < 0.5
    assert Llama4.from_pretrained(tmp_path / "file").chat("say 1", max_new_tokens=2).text
    for name, weights in ((str(teacher), teacher / "model.safetensors"), (file, Path(file))):
        dry = ["finetune", student, "--data", str(lines), "--method", "distill", "--teacher", name, "--dry-run"]
        assert main(dry) == 0
        found = re.search(r"beyond the model: ([\d.]+) (KiB|MiB) for the teacher", capsys.readouterr().out)
        assert found is not None
        said = float(found[1]) * {"KiB": 1 << 10, "MiB": 1 << 20}[found[2]]
        assert said == pytest.approx(weights.stat().st_size, rel=0.15)
    command = ["finetune", student, "--data", str(lines), "--method", "distill", "--output", str(tmp_path / "x")]
    assert main([*command, "--steps", "1"]) == 2
    assert "a teacher and method 'distill' go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--rank", "3"])


def test_teachers_that_do_not_fit(llm: Llama4, teacher: Path, lines: Path, tmp_path: Path) -> None:
    data = load_dataset(lines, llm.processor, max_length=99, progress=False)
    file = tmp_path / "t.safetensors"
    save_teacher(llm, data, file, top=2)
    shorter = load_dataset(lines, llm.processor, max_length=data.longest - 1, progress=False)
    with pytest.raises(ArgumentError, match="of the same data, but of other tokens; run `llama4 teach` with this max"):
        load_teacher(str(file), llm, shorter)
    other = load_dataset(write(tmp_path / "o.jsonl", {"text": "a"}), llm.processor, max_length=99, progress=False)
    with pytest.raises(ArgumentError, match="is of another file than"):
        load_teacher(str(file), llm, other)
    with pytest.raises(CheckpointError, match="is not there; write it with"):
        load_teacher(str(tmp_path / "no.safetensors"), llm, data)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is no file that `llama4 teach` wrote"):
        load_teacher(str(tmp_path / "a.safetensors"), llm, data)
    with pytest.raises(ArgumentError, match=r"line 1 of .* is other tokens to teacher tiny .* both must have the same"):
        load_teacher("tiny", llm, data, progress=False, max_length=99)
    for top in (0, llm.config.text.vocab_size):
        with pytest.raises(ArgumentError, match=f"top is {top}; it must be from 1 to"):
            save_teacher(llm, data, file, top=top)
    with pytest.raises(ArgumentError, match=r"let it end in \.safetensors"):
        save_teacher(llm, data, tmp_path / "t.bin")


def test_what_cannot_be_written_is_said_before_the_teacher_is_asked(
    llm: Llama4, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(lines, llm.processor, max_length=99, progress=False)
    monkeypatch.setattr(teaching, "hidden_states", lambda *_: pytest.fail("it was asked"))
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(DiskError, match=r"could not write .*d\.safetensors: Is a directory"):
        save_teacher(llm, data, tmp_path / "d.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"could not write .*: (File exists|Not a directory)"):
        save_teacher(llm, data, tmp_path / "file" / "x.safetensors")
    monkeypatch.setattr(teaching, "available_bytes", lambda device: 1000)
    with pytest.raises(ArgumentError, match=r"the 90 likeliest of \d+ tokens take .*, and 1000 bytes are free"):
        save_teacher(llm, data, tmp_path / "t.safetensors", top=90)


def test_probabilities_that_sum_to_more_are_refused(llm: Llama4, lines: Path, tmp_path: Path) -> None:
    data = load_dataset(lines, llm.processor, max_length=99, progress=False)
    save_teacher(llm, data, tmp_path / "t.safetensors", top=2)
    tensors = load_file(tmp_path / "t.safetensors")
    tensors["log_probs"][-1, 1] -= 0.5
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match="has probabilities that are none"):
        load_teacher(str(tmp_path / "t.safetensors"), llm, data)
