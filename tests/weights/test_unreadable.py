"""Why a directory cannot be loaded: the true reason, and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama4.api import Llama4
from llama4.errors import CheckpointError, ConfigError, Llama4Error
from llama4.weights.checkpoint import open_checkpoint
from tests import small_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
CONFIG = json.dumps(small_model.config().to_dict())


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=str(path)) as caught:
        Llama4.from_pretrained(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "it is empty"),
        (["model-Q4_K_M.gguf"], "model-Q4_K_M.gguf cannot be read as GGUF: it is too short; fetch it again"),
        (["config.json", "a.gguf"], "a.gguf cannot be read as GGUF"),
        (["a-Q4_0.gguf", "a-Q8_0.gguf"], "holds 2 models in GGUF; name one of them"),
        (["mmproj-f16.gguf"], "it holds a vision tower in GGUF, and not the model that belongs to it; fetch that, too"),
        (["adapter_config.json", "adapter_model.safetensors"], "it is an adapter for the model that .* merge it into"),
        (["model_index.json", "unet/config.json"], "it is a pipeline of diffusers"),
        (["config.json", "pytorch_model.bin"], r"its weights are pickles \(pytorch_model.bin\).* take its safetensors"),
        (["model.pth"], "its weights are pickles"),
        (["consolidated.00.pth"], "params.json does not stand beside Meta's consolidated.00.pth; fetch it, too"),
        (["config.json", "onnx/model.onnx"], "its weights are ONNX; take the safetensors"),
        (["config.json", "tf_model.h5"], "its weights are TensorFlow's"),
        (["config.json", "model.safetensors.incomplete"], "its download is not complete; fetch it again"),
        (["config.json", "weights.00.safetensors"], "neither in model.safetensors nor in shards that"),
        (["config.json"], "holds no weights: neither model.safetensors nor model.safetensors.index.json is there"),
        (["model.safetensors"], r"config\.json does not stand beside model\.safetensors; fetch it, too"),
        (
            ["config.json", "model-00001-of-00002.safetensors"],
            r"holds model-.*, but no model\.safetensors\.index\.json",
        ),
        (["README.md"], r"config\.json does not exist"),
        (["UD-Q4_K_XL/model-00001-of-00002.gguf"], r"GGUF in a folder; name the file, such as UD-Q4_K_XL/model-00001"),
        (["config.json", "Q4/a.gguf", "Q8/a.gguf"], r"GGUF in a folder; name the file, such as Q[48]/a\.gguf"),
        (["8b/config.json", "8b/model.safetensors"], r"there is a model in '8b': name it with subfolder='8b'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_a_directory_is(tmp_path: Path, files: list[str], reason: str) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(CONFIG if path.name == "config.json" else "x")
    message = refusal(tmp_path)
    assert re.search(reason, message), message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.bin", b"GGUF\3", r"it is a GGUF file by its content; name it a\.gguf"),
        ("pytorch_model.bin", b"PK", r"its weights are pickles \(pytorch_model\.bin\)"),
        ("model.onnx", b"", "its weights are ONNX; take the safetensors"),
        ("model.safetensors", b"", r"config\.json does not stand beside model\.safetensors"),
        ("tokenizer.json", b"{}", "it is a file; name the directory that holds config.json and the weights"),
    ],
)
def test_a_file(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(rf"{re.escape(name)} cannot be loaded: {reason}", refusal(tmp_path / name))


def test_a_file_of_a_model(tmp_path: Path) -> None:
    directory = small_model.write(tmp_path / "model")
    assert refusal(directory / "model.safetensors").endswith(f"it is a file; name the directory {directory}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "'' is no model"),
        ("https://huggingface.co/org/name", "a Hub id like 'org/name'"),
        ("hf://org/name", "a Hub id like 'org/name'"),
        ("llama4:scout", "a Hub id like 'organisation/name'"),
    ],
)
def test_names_that_are_none(name: str, words: str) -> None:
    with pytest.raises(Llama4Error, match=words):
        Llama4.from_pretrained(name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "preprocessor_config.json"])
def test_pointers_of_git_lfs(tmp_path: Path, name: str) -> None:
    directory = small_model.write(tmp_path / "model")
    (directory / name).write_text(POINTER)
    message = refusal(directory)
    assert "holds pointers of Git LFS in place of files; run `git lfs pull` there, or fetch" in message
    assert message.endswith(f"missing: {name}")
    with pytest.raises(CheckpointError, match="Git LFS"):
        open_checkpoint(directory)


def edited(directory: Path, **changes: Any) -> Path:
    small_model.write(directory)
    (directory / "config.json").write_text(json.dumps(json.loads(CONFIG) | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, r"HQQ \(quant_method 'hqq'\)"),
        ({"quantization_config": {"quant_method": "aqlm", "bits": 4}}, r"AQLM \(quant_method 'aqlm'\)"),
        ({"quantization_config": {"quant_method": "exl3", "bits": 4}}, r"ExLlamaV3 \(quant_method 'exl3'\)"),
        ({"quantization_config": {"quant_method": "new"}}, "quant_method 'new'"),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"a": 1}}, "a quant_method that it does not name"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"MLX \(bits 4, group_size 64 and no quant_method\)"),
        ({"quantization_config": {"group_size": 32, "bits": 8}}, r"MLX \(bits 8, group_size 32 and no quant_method\)"),
    ],
)
def test_quantized_in_ways_that_are_not_read(tmp_path: Path, changes: dict[str, Any], method: str | None) -> None:
    directory = edited(tmp_path / "model", **changes)
    if method is None:
        open_checkpoint(directory)
        return
    wanted = rf"config\.json says that its weights are quantized by {method}, which .* take the model in the format of"
    with pytest.raises(CheckpointError, match=wanted):
        open_checkpoint(directory)


@pytest.mark.parametrize("content", ["int4", ["int4"], {"quant_method": ["awq"]}])
def test_a_quantization_config_of_the_wrong_kind(tmp_path: Path, content: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"has (quantization_config|quant_method) = .*, which must be (an object|a text)"
    ):
        open_checkpoint(edited(tmp_path / "model", quantization_config=content))


@pytest.mark.parametrize("content", [5, {"quant_algo": "MIXED_PRECISION", "quantized_layers": [1]}])
def test_modelopts_file_of_the_wrong_kind(tmp_path: Path, content: Any) -> None:
    directory = small_model.write(tmp_path / "model")
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": content}))
    with pytest.raises(ConfigError, match=r"has (quantization|quantized_layers) = .*, which must be an object"):
        open_checkpoint(directory)


SPARSE = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, None),
        ({"config_groups": {}, "sparsity_config": SPARSE | {"format": "dense"}}, None),
        ({"sparsity_config": SPARSE}, "weights as 'sparse-24-bitmask', without their zeros, .* take one that stores"),
        ({"format": "marlin-24", "config_groups": {"group_0": {}}}, "'marlin-24'"),
        ({"config_groups": {}}, "has no config_groups: the configuration is damaged"),
    ],
)
def test_compressed_tensors_without_quantized_weights(
    tmp_path: Path, content: dict[str, Any], refusal: str | None
) -> None:
    """A cache that is quantized, or weights of which some are zero: they load where they are stored whole."""
    directory = edited(tmp_path / "model", quantization_config={"quant_method": "compressed-tensors", **content})
    if refusal is None:
        assert Llama4.from_pretrained(directory).model is not None
        return
    with pytest.raises(CheckpointError, match=refusal):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("part", "by"), [("weight_scale", "compressed-tensors or ModelOpt"), ("qweight", "GPTQ or AWQ"), ("scales", "MLX")]
)
def test_quantized_without_a_word(tmp_path: Path, part: str, by: str) -> None:
    """The configuration that says so was not fetched."""
    directory = edited(tmp_path / "model")
    key = f"language_model.model.layers.0.self_attn.q_proj.{part}"
    save_file({key: torch.ones(2)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{part} in .* quantized \({by}\), but .* has no quantization_config"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("model_type", "about"),
    [("mixtral", "Mistral AI"), ("gemma3", "Gemma")],
)
def test_other_models_are_named(tmp_path: Path, model_type: str, about: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{model_type}' is not Llama 4 or .* and this is .*{about}"):
        open_checkpoint(edited(tmp_path / "model", model_type=model_type))
