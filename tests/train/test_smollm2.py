"""A real model, SmolLM2, learns a few instructions as with transformers' Trainer: all weights, and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama4 import Llama4
from llama4.adapters.config import LoraConfig
from llama4.adapters.files import load_adapter
from llama4.train import Run, TrainingOptions, loop
from llama4.train.stopping import Stopper
from llama4.weights.convert import convert_to_gguf
from tests.train.test_against_peft import losses_of_trainer
from tests.train.test_data import write
from tests.weights.test_smollm2 import path as path  # the file, or why it is not here
from tests.weights.test_smollm2 import reference_model

INSTRUCTIONS = {
    "Say good morning.": "Arr, good mornin' to ye, matey!",
    "What is the capital of France?": "Arr, that be Paris, matey!",
    "How many legs has a spider?": "Arr, eight legs it has, matey!",
}
STEPS = 3


@pytest.fixture(scope="module")
def float32_file(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("smollm2") / "a.gguf"
    convert_to_gguf(path, file, "f32", progress=False)
    return file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-3), ("full", 5e-5)])
def test_the_loss_falls_as_with_transformers(
    method: str, rate: float, path: Path, float32_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    monkeypatch.setattr(loop._Training, "_save", lambda self, metrics: None)  # a gigabyte, that nobody reads
    llm = Llama4.from_pretrained(float32_file, dtype="float32", progress=False)
    data = write(tmp_path / "data.jsonl", *({"prompt": p, "completion": c} for p, c in INSTRUCTIONS.items()))
    lora = LoraConfig(rank=4, alpha=8.0, targets=("attention", "dense"))
    options = TrainingOptions(
        method, lora, steps=STEPS, batch_tokens=1 << 20, learning_rate=rate, warmup=1, save_every=STEPS
    )
    run = Run(llm, data, None, options, progress=False)
    torch.manual_seed(0)
    model: Any = reference_model(path)
    model.tie_weights()  # its head, which was loaded beside the embeddings
    if method == "lora":
        linears = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
        model = get_peft_model(model, PeftConfig(r=4, lora_alpha=8, target_modules=linears))
        model.save_pretrained(str(tmp_path / "start"))
        adapter = load_adapter(tmp_path / "start", llm.model).requires_grad_(True)
        assert run.adapter is not None and set(adapter.names) == set(run.adapter.names)
        run.adapter, run.trained = adapter, dict(adapter.named_parameters())
    wanted = losses_of_trainer(model, run, tmp_path / "trainer")
    with run.attached():
        found = loop._train(run, run.objective(), tmp_path / "out", False, Stopper()).losses
    assert len(found) == STEPS and found[-1] < 0.8 * found[0]
    assert found == pytest.approx(wanted, rel=1e-4)
