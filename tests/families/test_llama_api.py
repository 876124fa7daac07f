"""Dense Llama through `Llama4`: chat, completion, longer contexts, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.errors import Llama4Error
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import LLAMA3
from tests import small_model
from tests.parity.references import relative_error

FIRST = small_model.RANKS


def write(directory: Path, **changes: Any) -> Path:
    """A model as wide as the kernels want it, with Llama 3's special tokens behind a small vocabulary."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 1024}
    config = LlamaConfig(**{**sizes, "initializer_range": 0.05, "eos_token_id": FIRST + 9, **changes})
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[FIRST:] = 0  # greedy replies run to their limit
    model.save_pretrained(directory)
    small_model.write_tokenizer(directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama3"))


@torch.inference_mode()
def greedy(directory: Path, ids: list[int], count: int) -> list[int]:
    """By transformers, without a cache."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_chat(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next turn, a batch, and a step of compiled code give what transformers gives without a cache."""
    llm = Llama4.from_pretrained(directory, progress=False)
    assert llm.tokenizer.vocabulary is LLAMA3
    talk = [{"role": "user", "content": "Say something long about many things, please, and take your time for it."}]
    prompt = llm.processor(talk).input_ids[0].tolist()
    assert prompt[:2] == [FIRST, FIRST + 6]
    assert [token.id for token in llm.chat(talk, max_new_tokens=4).logprobs] == greedy(directory, prompt, 4)
    talk += [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
    prompt = llm.processor(talk).input_ids[0].tolist()
    wanted = greedy(directory, prompt, 4)
    assert [token.id for token in llm.chat(talk, max_new_tokens=4).logprobs] == wanted
    replies = llm.chat_batch([talk, "Hi"], max_new_tokens=4)
    assert [token.id for token in replies[0].logprobs] == wanted
    assert llm.runner.choose(llm.model.new_cache()).name == "fused CPU"
    assert not caplog.records


def test_a_base_model_completes(tmp_path: Path) -> None:
    llm = Llama4.from_pretrained(write(tmp_path, eos_token_id=FIRST + 1), progress=False)
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("Once upon a time")]
    assert [token.id for token in llm.complete("Once upon a time", max_new_tokens=4).logprobs] == greedy(
        tmp_path, ids, 4
    )
    with pytest.raises(Llama4Error, match=r"complete\(text\)"):
        llm.chat("Hello")


@torch.inference_mode()
def test_a_longer_context(directory: Path, tmp_path: Path) -> None:
    """A scaling that is given at load is transformers' with the same in config.json, and is saved."""
    llm = Llama4.from_pretrained(directory, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, progress=False)
    assert llm.config.text.max_position_embeddings == 512
    llm.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.rope_parameters["rope_type"] == "dynamic"
    ids = torch.randint(0, FIRST, (1, 300), generator=torch.Generator().manual_seed(0))
    assert relative_error(llm.model(ids), theirs(ids).logits) < 1e-5
    assert Llama4.from_pretrained(tmp_path, progress=False).config == llm.config


def test_a_prompt_beyond_the_border_is_read_anew(directory: Path) -> None:
    """Keys in the cache are rotated for another length: the next turn does not go on with them."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    llm = Llama4.from_pretrained(directory, rope_scaling=scaling, progress=False)
    fresh = Llama4.from_pretrained(directory, rope_scaling=scaling, progress=False)
    text = "many words " * 50
    for longer in (text, text + "and more"):
        reply = llm.complete(longer, max_new_tokens=3)
        fresh.cache = None
        assert reply.logprobs == fresh.complete(longer, max_new_tokens=3).logprobs


def test_biases_are_computed_without_the_compiled_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = Llama4.from_pretrained(write(tmp_path, attention_bias=True, mlp_bias=True), progress=False)
    llm.complete("Once", max_new_tokens=2)
    assert "decoding without the fused CPU runner, which is faster: layers.0.self_attn.q_proj has a bias" in caplog.text


def test_commands(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(directory), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(directory).parameters())
    assert main(["generate", "--model", str(directory), "Hi", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 2
    assert main(["generate", "--model", str(directory), "Hi", "--raw", "--max-new-tokens", "2", "--json"]) == 0
    assert main(["quantize", str(directory), str(tmp_path / "int4"), "--scheme", "int4"]) == 0
    assert main(["plan", str(directory), "--device", "h100"]) == 0
    capsys.readouterr()
    assert main(["generate", "--model", str(tmp_path / "int4"), "Hi", "--max-new-tokens", "2"]) == 0
    assert Tokenizer(tmp_path / "int4").vocabulary is LLAMA3
