"""TRL's trainers and lm-eval with `LlamaForTransformers`: an extra of their own, `pip install '.[trainers]'`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoTokenizer

from llama4.adapters.files import load_adapter
from llama4.api import Llama4
from llama4.integrations.transformers import LlamaForTransformers
from llama4.tiny import EMBEDDED
from llama4.train.data import Batches, load_dataset
from llama4.train.objectives import Preference
from tests import small_model
from tests.train.test_data import write
from tests.train.test_objectives import PAIRS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
DIRECTORY = str(EMBEDDED["tiny"])
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def model() -> Any:
    return LlamaForTransformers.from_pretrained("tiny", dtype="float32")


def settings(tmp_path: Path) -> dict[str, Any]:
    common: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return common | {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}


def longer(completions: list[str], **about: object) -> list[float]:
    return [float(len(text)) for text in completions]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "SFT": ("SFT", {"max_length": 64}, {}, [{"prompt": "What is red?", "completion": "A circle"}]),
    "SFT, LoRA, recomputed": (
        "SFT",
        {"max_length": 64, "gradient_checkpointing": True},
        {"peft_config": LORA},
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
    ),
    "DPO, LoRA": ("DPO", {}, {"peft_config": LORA}, [{"prompt": "What?", "chosen": "Yes it is", "rejected": "No"}]),
    "GRPO": ("GRPO", {"num_generations": 2, "max_completion_length": 6}, {"reward_funcs": longer}, [{"prompt": "Hi"}]),
    "RLOO, LoRA": (
        "RLOO",
        {"num_generations": 2, "max_completion_length": 6},
        {"reward_funcs": longer, "peft_config": LORA},
        [{"prompt": "Hi"}],
    ),
}
"""Name -> trainer, its options, further arguments, and the data."""


@pytest.mark.parametrize("case", CASES)
def test_trainers_of_trl(case: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trainers]'")
    datasets = pytest.importorskip("datasets")
    kind, options, arguments, rows = CASES[case]
    made, tokenizer = model(), AutoTokenizer.from_pretrained(DIRECTORY)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=made,
        args=getattr(trl, f"{kind}Config")(**settings(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list(rows * 4),
        processing_class=tokenizer,
        **arguments,
    )
    before = {name: weight.detach().clone() for name, weight in made.named_parameters()}
    trainer.train()
    changed = [n for n, weight in trainer.model.named_parameters() if weight.requires_grad and n.endswith("weight")]
    assert changed
    assert any(
        name not in before or not torch.equal(before[name], weight)
        for name, weight in trainer.model.named_parameters()
        if weight.requires_grad
    )
    assert all("loss" not in entry or entry["loss"] == entry["loss"] for entry in trainer.state.log_history)


def test_lm_eval() -> None:
    lm_eval = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    asked: Any = lm_eval.HFLM(pretrained=model(), tokenizer=AutoTokenizer.from_pretrained(DIRECTORY), batch_size=2)
    Instance = pytest.importorskip("lm_eval.api.instance").Instance
    pairs = [("What is", " red"), ("A red", " circle")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = asked.loglikelihood(requests)
    assert len(scores) == 2
    assert all(score < 0 for score, _ in scores)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_is_trls(kind: str, tmp_path: Path) -> None:
    """Our `--method dpo` and TRL's, of the same adapter on the same pairs: loss, rewards and gradients."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trainers]'")
    datasets = pytest.importorskip("datasets")
    directory, beta = small_model.write(tmp_path / "model"), 0.3
    trainer = trl.DPOTrainer(
        model=LlamaForTransformers.from_llama4(Llama4.from_pretrained(directory)),
        args=trl.DPOConfig(**settings(tmp_path), beta=beta, loss_type=kind),
        train_dataset=datasets.Dataset.from_list([{"prompt": "What?", "chosen": "Yes", "rejected": "No"}]),
        processing_class=AutoTokenizer.from_pretrained(DIRECTORY),
        peft_config=LORA,
    )
    trainer.aux_loss_enabled = False  # the routers' balance, which ours has as an option
    theirs = trainer.model
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    llm = Llama4.from_pretrained(directory)
    adapter = load_adapter(tmp_path / "adapter", llm.model).requires_grad_(True)
    pairs = write(tmp_path / "pairs.jsonl", *PAIRS)
    data = load_dataset(pairs, llm.processor, max_length=99, progress=False)
    batch = Batches(data.examples, llm.processor, 4096, None, data.rejected)[0]
    labels = F.pad(batch.is_learnt[:, :-1].long(), (1, 0))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "completion_mask": labels}
    wanted = trainer.compute_loss(theirs, inputs)
    wanted.backward()
    adapter.attach(llm.model)
    found = Preference(adapter, beta, kind)(llm.model, batch)
    (found.total / found.count).backward()
    assert found.total.item() / found.count == pytest.approx(wanted.item(), rel=1e-5)
    for ours, name in (("margin", "margins"), ("accuracy", "accuracies"), ("chosen_reward", "chosen")):
        metric = trainer._metrics["train"][f"rewards/{name}"][-1]
        assert found.values[ours] / found.count == pytest.approx(metric, rel=1e-4, abs=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, lora in adapter.items():
        for part, parameter in (("lora_A", lora.a), ("lora_B", lora.b)):
            if parameter.grad is not None:  # there are no pictures
                (other,) = (gradients.pop(key) for key in list(gradients) if f"{name}.{part}." in key)
                assert (parameter.grad - other).abs().max() <= 1e-4 * other.abs().max()
    assert not gradients
