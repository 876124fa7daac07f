"""A step of training with transformers and PEFT. Imported when it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Llama4ForCausalLM, Llama4TextConfig

from llama4.bench.peak_rates import timed
from llama4.bench.process_memory import peak_bytes, reset_peak, resident_bytes
from llama4.bench.training_task import RATE, Task

LINEARS = r".*layers\.\d+\.(self_attn\.[qkvo]_proj|feed_forward\.shared_expert\.\w+_proj)"
STACKS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


class Theirs:
    """transformers' model with PEFT's adapter, in a process of its own; see `llama4.bench.finetuning.Ours`."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        text = task.config.text
        config = Llama4TextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            intermediate_size_mlp=text.intermediate_size_mlp,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            num_local_experts=text.num_local_experts,
            num_experts_per_tok=text.num_experts_per_tok,
            moe_layers=list(text.moe_layers or ()),
            use_qk_norm=text.use_qk_norm,
            pad_token_id=0,
        )
        base: Any = Llama4ForCausalLM(config).float()
        for parameter in base.parameters():
            parameter.data.normal_(std=0.02)
        lora = LoraConfig(r=task.rank, lora_alpha=32, target_modules=LINEARS, target_parameters=STACKS)
        self._model: Any = get_peft_model(base, lora).train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=RATE)
        self._ids = task.ids()

    def resident(self) -> int:
        reset_peak()
        return resident_bytes()

    def step(self) -> float:
        return timed(self._step)

    def _step(self) -> None:
        self._model(input_ids=self._ids, labels=self._ids).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def peak(self) -> int:
        return peak_bytes()
