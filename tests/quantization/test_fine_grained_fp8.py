"""FP8 in blocks, as transformers' `FineGrainedFP8` has it: quantized and dequantized by its own code."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from llama4.api import Llama4
from llama4.errors import CheckpointError
from llama4.quantization.weight import QuantizedWeight
from tests.parity.references import relative_error

IDS = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries, so that rows of q and k have another order in the files than in the model."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 200}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def quantized(
    plain: Path, directory: Path, block: list[int] | None = None, scales: str = "float"
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint, and the weights that it stands for."""
    described = SimpleNamespace(weight_block_size=block, scale_fmt="ue8m0" if scales != "float" else "float")
    method = SimpleNamespace(quantization_config=described)
    quantize, dequantize = Fp8Quantize(method), Fp8Dequantize(method)
    written, truth = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(plain / "model.safetensors").items():
        if "_proj." not in name:
            written[name] = truth[name] = weight
            continue
        values, scale = quantize._quantize_one(name, weight).values()
        scale = scale.view(torch.uint8) if scales == "bytes" else scale
        truth[name] = dequantize._dequantize_one(values, scale, torch.float32)
        written |= {name: values, f"{name}_scale_inv": scale}
        written[name.replace("weight", "activation_scale")] = torch.tensor(0.5)
    directory.mkdir()
    save_file(written, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    content = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": block}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
    return directory, truth


@pytest.mark.parametrize(("block", "scales"), [([32, 16], "float"), ([32, 32], "ue8m0"), ([32, 32], "bytes")])
@torch.inference_mode()
def test_blocks_are_dequantized(
    block: list[int], scales: str, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In float32 exactly, and it is said."""
    directory, truth = quantized(plain, tmp_path / "model", block, scales)
    with caplog.at_level(logging.WARNING):
        llm = Llama4.from_pretrained(directory, dtype="float32", progress=False)
    assert f"14 matrices are stored in {'' if scales == 'float' else 'mx'}fp8, a scale per block of" in caplog.text
    theirs = LlamaForCausalLM.from_pretrained(plain)
    theirs.load_state_dict(truth)
    assert relative_error(llm.model(IDS), theirs(IDS).logits) < 1e-5


@torch.inference_mode()
def test_a_scale_per_matrix_runs_as_fp8(plain: Path, tmp_path: Path) -> None:
    directory, truth = quantized(plain, tmp_path / "model")
    model = Llama4.from_pretrained(directory, dtype="float32", progress=False).model
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    assert {weight.format.kind for weight in weights} == {"fp8"}
    down = model.get_submodule("language_model.model.layers.1.feed_forward.down_proj")
    assert isinstance(down, QuantizedWeight)
    torch.testing.assert_close(down.dequantize(), truth["model.layers.1.mlp.down_proj.weight"])
    theirs = LlamaForCausalLM.from_pretrained(plain)
    theirs.load_state_dict(truth)
    assert relative_error(model(IDS), theirs(IDS).logits) < 0.05, "inputs are rounded"


@torch.inference_mode()
def test_a_scale_per_matrix_in_other_words(plain: Path, tmp_path: Path) -> None:
    """As an exponent; and as vLLM and AutoFP8 name it, beside those of inputs and caches."""
    directory, truth = quantized(plain, tmp_path / "model", scales="ue8m0")
    theirs = LlamaForCausalLM.from_pretrained(plain)
    theirs.load_state_dict(truth)
    expected = theirs(IDS).logits
    model = Llama4.from_pretrained(directory, dtype="float32", progress=False).model
    assert relative_error(model(IDS), expected) < 0.05
    directory, _ = quantized(plain, tmp_path / "other")
    written = {
        name.replace("weight_scale_inv", "weight_scale").replace("activation_scale", "input_scale"): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    written["model.layers.0.self_attn.k_scale"] = torch.tensor(1.0)
    save_file(written, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]["weight_block_size"]
    (directory / "config.json").write_text(json.dumps(config))
    model = Llama4.from_pretrained(directory, dtype="float32", progress=False).model
    assert relative_error(model(IDS), expected) < 0.1


@pytest.mark.parametrize(
    ("scale", "said"), [(None, r"values in fp8 have no weight_scale_inv(.|\n)*q_proj"), (torch.int64, "must be floats")]
)
def test_values_without_a_scale_are_refused(scale: torch.dtype | None, said: str, plain: Path, tmp_path: Path) -> None:
    directory, _ = quantized(plain, tmp_path / "model", [32, 32])
    content, name = load_file(directory / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight_scale_inv"
    tensor = content.pop(name)
    if scale is not None:
        content[name] = tensor.to(scale)
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        Llama4.from_pretrained(directory, progress=False)


@pytest.mark.parametrize("block", ["128", [128], [0, 128], [128, "128"], {}])
def test_a_block_that_is_none(block: object, plain: Path, tmp_path: Path) -> None:
    directory, _ = quantized(plain, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_block_size of quantization_config is .*; it must be two sizes"):
        Llama4.from_pretrained(directory, progress=False)


def test_scales_of_another_shape(plain: Path, tmp_path: Path) -> None:
    directory, _ = quantized(plain, tmp_path / "model", [32, 32])
    content = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(content | {name: content[name][:1]}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj is stored in fp8, .* has scales \[1, 2\], where \[3, 2\]"):
        Llama4.from_pretrained(directory, progress=False)
