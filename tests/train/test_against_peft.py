"""Fifty steps of training against transformers' Trainer with PEFT: the same data, the same adapter at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llama4.adapters.config import LoraConfig
from llama4.adapters.files import load_adapter
from llama4.train import Run, TrainingOptions, loop
from llama4.train.data import Batch
from llama4.train.loss import IGNORED
from llama4.train.stopping import Stopper
from tests import small_model
from tests.adapters.test_files import STACKS, theirs
from tests.train.test_data import write

STEPS, RATE, WARMUP = 50, 3e-3, 3


def as_transformers(batch: Batch) -> dict[str, torch.Tensor]:
    """It shifts the labels itself."""
    labels = F.pad(batch.labels[:, :-1], (1, 0), value=IGNORED)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def losses_of_trainer(model: Any, run: Run, directory: Path) -> list[float]:
    """Of the steps of a run, with its batches in its order."""
    from transformers import Trainer, TrainingArguments

    wanted: list[float] = []

    def in_order(trainer: Any, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(trainer.train_dataset)

    def recorded_step(trainer: Any, *args: Any, **options: Any) -> Any:
        loss = Trainer.training_step(trainer, *args, **options)
        wanted.append(loss.item())
        return loss

    recorded: Any = type("Recorded", (Trainer,), {"_get_train_sampler": in_order, "training_step": recorded_step})
    options = run.options
    assert options.learning_rate is not None
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=1,
        max_steps=run.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps(run.steps),
        max_grad_norm=options.clip,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [as_transformers(run.batches[step]) for step in range(run.steps)]
    recorded(model, arguments, train_dataset=data, data_collator=lambda items: items[0]).train()
    return wanted


@pytest.mark.filterwarnings("ignore")
def test_losses_are_those_of_trainer_and_peft(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    directory = small_model.write(tmp_path / "model")
    lines = ({"prompt": f"say {i * 7} {i}", "completion": f"it is {i % 3} and {i % 5}"} for i in range(60))
    options = TrainingOptions(
        lora=LoraConfig(rank=4, alpha=8.0), steps=STEPS, batch_tokens=120, learning_rate=RATE, warmup=WARMUP
    )
    run = Run(directory, write(tmp_path / "data.jsonl", *lines), None, options, progress=False)
    linears = r".*language_model.*(self_attn\.[qkvo]_proj|shared_expert\.\w+_proj)"
    config = PeftConfig(r=4, lora_alpha=8, target_modules=linears, target_parameters=STACKS)
    torch.manual_seed(0)
    model = get_peft_model(theirs(directory), config)
    model.save_pretrained(str(tmp_path / "start"))
    adapter = load_adapter(tmp_path / "start", run.llm.model).requires_grad_(True)
    assert set(adapter.names) == set(run.adapter.names) if run.adapter else False
    run.adapter, run.trained = adapter, dict(adapter.named_parameters())

    wanted = losses_of_trainer(model, run, tmp_path / "trainer")
    with run.attached():
        found = loop._train(run, run.objective(), tmp_path / "out", False, Stopper()).losses
    assert len(found) == len(wanted) == STEPS and found[-1] < 0.7 * found[0]
    assert found == pytest.approx(wanted, rel=1e-4)
