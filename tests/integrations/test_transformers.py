"""`LlamaForTransformers` beside transformers' own class of the same checkpoint: numbers, names, and who can use it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Llama4ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

from llama4 import ArgumentError, Llama4
from llama4.integrations.transformers import LlamaForTransformers
from llama4.tiny import EMBEDDED
from tests.integrations import test_accelerate
from tests.integrations.test_accelerate import apart

# PEFT and Trainer ask by a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
DIRECTORY = str(EMBEDDED["tiny"])
IDS_BT = torch.randint(0, 800, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return Llama4ForConditionalGeneration.from_pretrained(DIRECTORY, dtype=torch.float32)


@pytest.fixture
def ours() -> LlamaForTransformers:
    return LlamaForTransformers.from_pretrained("tiny", dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, padding_side="left")
    encoded: dict[str, Tensor] = tokenizer(["What is", "A red circle and a"], return_tensors="pt", padding=True)
    return encoded


def test_logits_loss_and_names(ours: Any, theirs: Any) -> None:
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    with torch.inference_mode():
        mine, other = ours(IDS_BT, labels=IDS_BT), theirs(IDS_BT, labels=IDS_BT)
        assert apart(mine.logits, other.logits) < 1e-5
        assert mine.loss.item() == pytest.approx(other.loss.item(), rel=1e-5)
        last = ours(IDS_BT, logits_to_keep=1).logits
        assert apart(last, other.logits[:, -1:]) < 1e-5
    hidden = ours.base_model(IDS_BT).last_hidden_state
    assert torch.equal(ours.get_output_embeddings()(hidden), ours(IDS_BT).logits)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "temperature": 0.8}, {"use_cache": False}],
)
def test_generate(ours: Any, theirs: Any, prompts: Any, settings: dict[str, Any]) -> None:
    results = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        results.append(model.generate(**prompts, max_new_tokens=8, **{"do_sample": False, **settings}))
    assert torch.equal(*results)


def test_a_picture(ours: Any) -> None:
    """From this library's processor, whose tensors are those of transformers'."""
    content = [
        {"type": "image", "image": "examples/shapes.png"},
        {"type": "text", "text": "How many shapes are there?"},
    ]
    inputs = ours.llm.processor([{"role": "user", "content": content}])
    given = {"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values}
    out = ours.generate(**given, attention_mask=inputs.attention_mask, max_new_tokens=8, do_sample=False)
    assert ours.llm.tokenizer.decode(out[0, inputs.input_ids.shape[1] :].tolist()).startswith("Four")


def test_files(ours: Any, theirs: Any, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    again = Llama4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(again(IDS_BT).logits, theirs(IDS_BT).logits)


def test_a_model_of_text_alone(tmp_path: Path) -> None:
    theirs = test_accelerate.model()
    theirs.save_pretrained(tmp_path)
    ours: Any = LlamaForTransformers.from_pretrained(tmp_path, dtype="float32")
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    with torch.inference_mode():
        assert apart(ours(test_accelerate.IDS_BT).logits, theirs(test_accelerate.IDS_BT).logits) < 1e-5


def test_adapters_are_those_of_transformers_class(ours: Any, theirs: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(ours, config)
    adapted.save_pretrained(str(tmp_path))
    with torch.inference_mode():
        wanted = adapted(input_ids=IDS_BT).logits
        theirs = copy.deepcopy(theirs)
        theirs.load_adapter(tmp_path)
        assert apart(theirs(IDS_BT).logits, wanted) < 1e-5


@pytest.mark.parametrize("recomputed", [False, True])
def test_trainer_learns_as_with_transformers_class(theirs: Any, ours: Any, recomputed: bool, tmp_path: Path) -> None:
    """The same weights after a few steps, with the routers' balance loss."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 800, (4, 12)).unbind()]
    settings: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    results = []
    for model in (copy.deepcopy(theirs), ours):
        arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=recomputed and model is ours, **settings)
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        with torch.inference_mode():
            results.append(model(IDS_BT).logits)
    assert apart(results[1], results[0]) < 1e-3
    with torch.inference_mode():
        assert apart(results[0], theirs(IDS_BT).logits) > 0.01, "something was learned"


def test_router_logits(ours: Any, theirs: Any) -> None:
    """As TRL's trainers ask for them; with activations computed again, too, and another forward between."""
    text = ours.config.get_text_config()
    out = ours(IDS_BT, labels=IDS_BT, output_router_logits=True)
    assert len(out.router_logits) == len(ours.llm.config.text.moe_layers)
    assert out.router_logits[0].shape == (IDS_BT.numel(), text.num_experts)
    plain = ours(IDS_BT, labels=IDS_BT)
    assert out.loss.item() == pytest.approx(plain.loss.item() + text.router_aux_loss_coef * out.aux_loss.item())
    ours.gradient_checkpointing_enable()
    again = ours(IDS_BT, labels=IDS_BT, output_router_logits=True)
    with torch.no_grad():
        ours(IDS_BT)
    again.loss.backward()
    out.loss.backward()


def test_generate_where_the_configuration_asks_for_router_logits(ours: Any, prompts: dict[str, Tensor]) -> None:
    """As TRL leaves it after training."""
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    plain = ours.generate(**prompts, **settings)
    ours.config.get_text_config().output_router_logits = True
    assert torch.equal(ours.generate(**prompts, **settings), plain)


def test_pipeline(ours: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    asked: Any = pipeline("text-generation", model=ours, tokenizer=tokenizer)
    assert asked("What is", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("What is")


def test_by_name_after_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    LlamaForTransformers.register()
    assert isinstance(AutoModelForCausalLM.from_pretrained(DIRECTORY), LlamaForTransformers)


def test_what_it_does_not_take(ours: Any) -> None:
    with pytest.raises(ArgumentError, match="not inputs_embeds"):
        ours(inputs_embeds=torch.zeros(1, 2, 192))
    with pytest.raises(ArgumentError, match="packed into one"):
        ours(IDS_BT, position_ids=torch.tensor([[*range(9), *range(8)]]))
    with pytest.raises(ArgumentError, match="lives on one device"):
        LlamaForTransformers.from_pretrained("tiny", device_map={"": 0})
    with pytest.raises(ArgumentError, match="give quantization="):
        LlamaForTransformers.from_pretrained("tiny", quantization_config={"load_in_4bit": True})
    with pytest.raises(ArgumentError, match="push_to_hub"):
        ours.save_pretrained("/nowhere", push_to_hub=True)
    ours.save_pretrained("/nowhere", is_main_process=False)  # another process writes
    assert isinstance(LlamaForTransformers.from_llama4(Llama4.from_pretrained("tiny")), LlamaForTransformers)
