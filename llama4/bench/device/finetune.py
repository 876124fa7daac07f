"""A step of training an adapter that reaches the experts, on four layers of Scout: over bfloat16, and over int4."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from llama4.adapters.config import LoraConfig
from llama4.adapters.lora import Adapter
from llama4.analysis.finetuning import Training, flops_per_token
from llama4.bench.device import timing, workload
from llama4.bench.device.record import Figures, Record
from llama4.bench.training_task import RATE, TARGETS
from llama4.train.data import Batch
from llama4.train.loss import IGNORED
from llama4.train.optimizer import AdamW
from llama4.train.step import learn


def run(record: Record) -> None:
    for scheme in (None, "int4"):
        record.case(f"LoRA over {scheme or 'bfloat16'}, 4 layers", partial(_step, record, scheme))
        timing.release(record.device)


def _step(record: Record, scheme: str | None) -> Figures:
    """Of four rows; the first two are not counted."""
    text = workload.text_config("scout", layers=4, dry=record.dry)
    with torch.inference_mode(False), torch.enable_grad():
        model, _ = workload.build(workload.config(text), record.device, scheme)
        adapter = Adapter.create(model, LoraConfig(rank=16, targets=TARGETS)).train()
        adapter.attach(model)
        optimizer = AdamW(dict(adapter.named_parameters()))
        ids = workload.ids(text, 4, 16 if record.dry else 512, record.device)
        batch = Batch(ids, torch.ones_like(ids), F.pad(ids[:, 1:], (0, 1), value=IGNORED), None, ())

        def step() -> None:
            learn(model, batch)
            optimizer.step(RATE)

        spent = record.time(step, 1.0, 5)
    training = Training("lora", LoraConfig(rank=16, targets=TARGETS), ids.numel(), ids.shape[1])
    flops = ids.numel() * sum(flops_per_token(text, training, recomputed=False))
    rate = record.rates.get("bf16_tflops")
    return {
        "step_ms": spent * 1e3,
        "tokens_per_s": ids.numel() / spent,
        "share_of_gemm": flops / spent / rate / 1e12 if rate else None,
    }
