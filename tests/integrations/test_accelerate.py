"""This library's experts in transformers' models: the same numbers, for only the tokens that are routed there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from llama4 import ArgumentError, accelerate
from llama4.model.experts import BACKENDS, backends_for
from llama4.tiny import EMBEDDED

# PEFT and Trainer ask by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
IDS_BT = torch.randint(0, 90, (2, 23), generator=torch.Generator().manual_seed(1))


def model(top_k: int = 1) -> Any:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=6,
        num_experts_per_tok=top_k,
        interleave_moe_layer_step=2,
        pad_token_id=0,
    )
    made: Any = Llama4ForCausalLM(config)
    for name, weight in made.named_parameters():
        if "norm" not in name:
            nn.init.normal_(weight, std=0.15)
    return made


def apart(logits: Tensor, wanted: Tensor) -> float:
    """Largest difference, beside the largest number."""
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()


def gradients(made: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = made(IDS_BT, labels=IDS_BT, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["auto", *backends_for(torch.device("cpu"), torch.float32)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_forward_and_backward_are_those_of_transformers(backend: str, top_k: int) -> None:
    theirs = model(top_k)
    ours = accelerate(copy.deepcopy(theirs), backend)
    wanted, got = gradients(theirs), gradients(ours)
    assert apart(got[0], wanted[0]) < 1e-6
    assert wanted[1].keys() == got[1].keys(), "every parameter that had a gradient has one"
    for name, gradient in wanted[1].items():
        assert (gradient - got[1][name]).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    with torch.inference_mode():
        assert apart(ours(IDS_BT).logits, theirs(IDS_BT).logits) < 1e-6
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(theirs.generate(IDS_BT, **settings), ours.generate(IDS_BT, **settings))


def test_only_routed_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, rows = accelerate(model(), "grouped"), []
    product = BACKENDS["grouped"].product

    def counted(self: Any, x_RI: Tensor, counts_E: Tensor, weight_EIO: Tensor) -> Tensor:
        rows.append(len(x_RI))
        return product(self, x_RI, counts_E, weight_EIO)

    monkeypatch.setattr(BACKENDS["grouped"], "product", counted)
    ours(IDS_BT)
    assert rows == [IDS_BT.numel()] * 4, "two layers with two products, where transformers computes six times as many"


def test_files_stay_theirs(tmp_path: Path) -> None:
    ours = accelerate(model())
    accelerate(ours)  # once more changes nothing
    ours.save_pretrained(tmp_path)
    again = Llama4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again.model.layers[1].feed_forward.experts) is Llama4TextExperts
    with torch.inference_mode():
        assert apart(again(IDS_BT).logits, ours(IDS_BT).logits) < 1e-6


def test_a_model_with_pictures() -> None:
    """The embedded one; the decoder is inside."""
    theirs = Llama4ForConditionalGeneration.from_pretrained(EMBEDDED["tiny"], dtype=torch.float32)
    ours = accelerate(copy.deepcopy(theirs))
    with torch.inference_mode():
        assert apart(ours(IDS_BT).logits, theirs(IDS_BT).logits) < 1e-6


@pytest.mark.parametrize("stacks", [None, ["experts.gate_up_proj", "experts.down_proj"]])
def test_adapters_of_peft_are_computed(stacks: list[str] | None) -> None:
    """Those of Linears, and those of the stacked experts, which hang on the experts' module."""
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], target_parameters=stacks, init_lora_weights=False)
    results = []
    for ours in (False, True):
        torch.manual_seed(3)
        made: Any = get_peft_model(accelerate(model()) if ours else model(), config)
        results.append(gradients(made))
        with torch.inference_mode(), made.disable_adapter():
            without = made(IDS_BT).logits
        assert (without - results[-1][0]).abs().max() > 0.01, "the adapter matters"
    (wanted, wanted_gradients), (got, got_gradients) = results
    assert apart(got, wanted) < 1e-6
    assert wanted_gradients.keys() == got_gradients.keys()
    for name, gradient in wanted_gradients.items():
        assert (gradient - got_gradients[name]).norm() <= 1e-4 * gradient.norm() + 1e-8, name


def test_what_cannot_be_accelerated() -> None:
    with pytest.raises(ArgumentError, match="Linear has no mixture of experts"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="'fast' is not known"):
        accelerate(model(), "fast")
    other = model()
    other.model.layers[3].feed_forward.experts = nn.Identity()
    with pytest.raises(ArgumentError, match="the experts are Identity"):
        accelerate(other)
    assert type(other.model.layers[1].feed_forward.experts) is Llama4TextExperts, "nothing was changed"
    with pytest.raises(ArgumentError, match="megablocks"):
        accelerate(model(), "megablocks")
