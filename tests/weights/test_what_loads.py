"""Shapes of models and ways to write them that are met in the wild, against transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig

from llama4 import Llama4
from llama4.config import Llama4Config
from llama4.errors import CheckpointError, ConfigError
from llama4.weights.convert import convert, quantize
from tests.parity.references import ReferenceModel, reference_config, reference_model, relative_error
from tests.text.test_added_tokens import token
from tests.text.test_added_tokens import write as write_tokenizer

IDS = torch.arange(40)[None]
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def change(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def loaded(directory: Path, **options: Any) -> Llama4:
    return Llama4.from_pretrained(directory, dtype="float32", progress=False, **options)


# -- a dense model ---------------------------------------------------------------------------------------------------

DENSE = {"moe_layers": [], "num_local_experts": 0, "num_experts_per_tok": 0, "interleave_moe_layer_step": 0}


@pytest.fixture
def mobile(tmp_path: Path) -> tuple[Path, Any]:
    """MobileLLM-R1: all layers dense and with RoPE, tied embeddings, and Llama 3's names of tokens."""
    torch.manual_seed(0)
    fields: Any = reference_config(tie_word_embeddings=True).text_config
    text = fields.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 8e6}}
    text |= DENSE | {"no_rope_layers": [1] * 7, "head_dim": 16}
    text |= {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"]}
    text |= {"num_hidden_layers": 3, "attn_temperature_tuning": False, "attention_chunk_size": 32768}
    text |= {"vocab_size": 300, "bos_token_id": 259, "eos_token_id": [260, 263], "pad_token_id": 0}
    model = Llama4ForCausalLM(Llama4TextConfig(**text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.08)
        model.model.embed_tokens.weight[[*range(128, 256), *range(259, 300)]] = 0  # replies are text, and go on
    model.save_pretrained(tmp_path / "mobile")
    write_tokenizer(tmp_path / "mobile", [token(259 + i, name, special=True) for i, name in enumerate(LLAMA3)])
    return tmp_path / "mobile", model


@pytest.mark.parametrize("fields", [{}, {"intermediate_size": 0}, {"num_local_experts": 1, "num_experts_per_tok": 1}])
@torch.inference_mode()
def test_a_dense_model_with_llama_3s_tokens(mobile: tuple[Path, Any], fields: dict[str, int]) -> None:
    directory, theirs = mobile
    change(directory, **DENSE | fields)
    llm = loaded(directory)
    assert llm.model.language_model.lm_head.weight is llm.model.language_model.model.embed_tokens.weight
    assert relative_error(llm.model(IDS), theirs(IDS).logits) < 1e-5
    inputs = llm.processor.complete("the cat")
    assert inputs.input_ids[0].tolist() == AutoTokenizer.from_pretrained(directory)("the cat")["input_ids"]
    expected = theirs.generate(inputs.input_ids, do_sample=False, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]
    assert llm.complete("the cat", max_new_tokens=12).text == llm.tokenizer.decode(expected.tolist())
    llm.save_pretrained(directory.parent / "saved")
    again = Llama4ForCausalLM.from_pretrained(directory.parent / "saved").eval()
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def test_a_dense_model_chats_by_its_own_template(mobile: tuple[Path, Any]) -> None:
    directory, _ = mobile
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )
    llm, conversation = loaded(directory), [{"role": "user", "content": "the cat"}]
    theirs: Any = AutoTokenizer.from_pretrained(directory).apply_chat_template(conversation)
    assert llm.processor([conversation]).input_ids[0].tolist() == theirs["input_ids"]
    assert set(llm.stop_ids) == {260, 263}


@torch.inference_mode()
def test_a_dense_model_quantized(mobile: tuple[Path, Any]) -> None:
    directory, _ = mobile
    change(directory, **DENSE, intermediate_size=0)
    quantize(directory, directory.parent / "int8", "int8", progress=False)
    on_load = loaded(directory, quantization="int8").model
    assert torch.equal(loaded(directory.parent / "int8").model(IDS), on_load(IDS))
    assert Llama4Config.from_directory(directory).num_parameters() == sum(
        parameter.numel() for parameter in loaded(directory).model.parameters()
    )


@pytest.mark.parametrize("name", ["num_experts_per_tok", "intermediate_size"])
def test_where_layers_have_experts_these_have_a_size(name: str) -> None:
    text = reference_config().to_dict()["text_config"]
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not 0"):
        Llama4Config.from_dict(text | {name: 0})


def test_a_step_of_zero_names_no_layers() -> None:
    text = reference_config().to_dict()["text_config"] | {"interleave_moe_layer_step": 0}
    with pytest.raises(ConfigError, match="interleave_moe_layer_step must be at least 1"):
        Llama4Config.from_dict(text | {"moe_layers": None})
    with pytest.raises(ConfigError, match="intermediate_size_mlp must be at least 1"):
        Llama4Config.from_dict(text | {"moe_layers": [0, 1, 2], "intermediate_size_mlp": 0})


# -- the decoder of a multimodal checkpoint --------------------------------------------------------------------------


@pytest.fixture
def multimodal(tmp_path: Path) -> tuple[Path, ReferenceModel]:
    model = reference_model(reference_config(num_hidden_layers=2))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@torch.inference_mode()
def test_text_config_beside_multimodal_weights(
    multimodal: tuple[Path, ReferenceModel], caplog: pytest.LogCaptureFixture
) -> None:
    directory, theirs = multimodal
    config = json.loads((directory / "config.json").read_text())["text_config"]
    (directory / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "llama4"):
        llm = loaded(directory)
    (note,) = (record.getMessage() for record in caplog.records)
    assert "of a vision tower, and config.json is of the decoder alone" in note
    assert llm.model.vision_model is None
    assert relative_error(llm.model(IDS), theirs(IDS).logits) < 1e-5
    llm.save_pretrained(directory.parent / "saved")
    assert not any("vision" in key for key in load_file(directory.parent / "saved" / "model.safetensors"))
    again = Llama4ForCausalLM.from_pretrained(directory.parent / "saved").eval()
    assert relative_error(again(IDS).logits, theirs(IDS).logits) < 1e-5


@pytest.mark.parametrize("prefix", ["", "language_model."], ids=["text-only names", "multimodal names"])
@torch.inference_mode()
def test_a_multimodal_config_beside_weights_of_the_decoder(
    multimodal: tuple[Path, ReferenceModel], caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    directory, theirs = multimodal
    tensors = load_file(directory / "model.safetensors")
    text = {key: tensor for key, tensor in tensors.items() if key.startswith("language_model.")}
    text = {prefix + key.removeprefix("language_model."): tensor for key, tensor in text.items()}
    save_file(text, directory / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "llama4"):
        llm = loaded(directory)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "config.json has a vision tower, and the weights have none: the model reads text alone"
    ]
    assert relative_error(llm.model(IDS), theirs(IDS).logits) < 1e-5
    convert(directory, directory.parent / "converted", "hf", progress=False)
    again = Llama4ForCausalLM.from_pretrained(directory.parent / "converted").eval()
    assert relative_error(again(IDS).logits, theirs(IDS).logits) < 1e-5
    save_file(
        text | {"vision_model.class_embedding": tensors["vision_model.class_embedding"]},
        directory / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="keys missing"):
        loaded(directory)


# -- experts ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_experts_that_are_three_linears_each(multimodal: tuple[Path, ReferenceModel]) -> None:
    """As llm-compressor has them before it quantizes: no quantization_config, and nothing but Linears."""
    directory, theirs = multimodal
    tensors = load_file(directory / "model.safetensors")
    for key in [key for key in tensors if key.endswith("gate_up_proj")]:
        path = key.removesuffix(".gate_up_proj")
        for i, (gate_up, down) in enumerate(zip(tensors.pop(key), tensors.pop(f"{path}.down_proj"), strict=True)):
            gate, up = gate_up.mT.chunk(2)
            for name, matrix in (("gate", gate), ("up", up), ("down", down.mT)):
                tensors[f"{path}.{i}.{name}_proj.weight"] = matrix.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ours = loaded(directory).model
    assert relative_error(ours(IDS), theirs(IDS).logits) < 1e-5
    for narrow in (".experts.0.", ".experts.2."):  # no weight is rounded, whichever of a layer's experts comes first
        mixed = {key: tensor.bfloat16() if narrow in key else tensor for key, tensor in tensors.items()}
        save_file(mixed, directory / "model.safetensors", metadata={"format": "pt"})
        path, stacked = "language_model.model.layers.0.feed_forward.experts", loaded(directory).model.state_dict()
        for i, expert in enumerate(stacked[f"{path}.down_proj"]):
            assert torch.equal(expert.mT, mixed[f"{path}.{i}.down_proj.weight"].float())
    missing = next(key for key in tensors if key.endswith("experts.2.up_proj.weight"))
    for cut in (tensors[missing][:1], tensors[missing][:, :-1]):
        save_file(tensors | {missing: cut.contiguous()}, directory / "model.safetensors")
        with pytest.raises(CheckpointError, match="experts of one layer differ in shape") as caught:
            loaded(directory)
        assert caught.value.mismatched == ((missing, tuple(cut.shape), tuple(tensors[missing].shape)),)
    del tensors[missing]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"of the 4 experts of .* some parts are missing") as caught:
        loaded(directory)
    assert caught.value.missing == (missing,)
