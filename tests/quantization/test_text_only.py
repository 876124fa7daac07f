"""Quantized text-only checkpoints, whose files name modules without the model's prefix: what a configuration says of
modules is in the names of the files, against transformers with compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM

from llama4.api import Llama4
from llama4.errors import CheckpointError
from llama4.quantization.schemes import SCHEMES
from llama4.weights.convert import convert, quantize
from tests.parity.references import reference_config
from tests.quantization.test_checkpoints import assert_equal, loaded, packed

ATTENTION = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(4) for x in "qkvo"]


def write(directory: Path, *, tied: bool = False) -> Path:
    """A bf16 checkpoint, as transformers writes it."""
    torch.manual_seed(3)
    config: Any = reference_config(head_dim=32, tie_word_embeddings=tied).text_config
    model = Llama4ForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.08)
    model.save_pretrained(directory)
    return directory


def quantization(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return content


def edit(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


def assert_transformers_agrees(directory: Path) -> None:
    other = Llama4ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert_equal(loaded(directory), other)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_transformers_reads_what_we_write(tmp_path: Path, scheme: str, tied: bool) -> None:
    plain = write(tmp_path / "plain", tied=tied)
    quantize(plain, tmp_path / "model", scheme, head=scheme == "int8" and not tied, progress=False)
    content = quantization(tmp_path / "model")
    keys = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert not any("language_model" in name for name in (*content["ignore"], *keys))
    assert ("lm_head" in content["ignore"]) == ("lm_head.weight_scale" not in keys)
    assert_transformers_agrees(tmp_path / "model")
    Llama4(loaded(plain, scheme, "bfloat16"), None).save_pretrained(tmp_path / "saved")
    if "lm_head.weight_scale" not in keys:
        assert quantization(tmp_path / "saved") == content
    convert(tmp_path / "model", tmp_path / "converted", "hf", progress=False)
    assert quantization(tmp_path / "converted") == content


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Attention in int8, all else in int4, with targets in the files' names."""
    plain = write(tmp_path / "plain")
    for scheme in ("int4", "int8"):
        quantize(plain, tmp_path / scheme, scheme, progress=False)
    tensors = load_file(tmp_path / "int4" / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if "self_attn" not in key}
    bytes_of = load_file(tmp_path / "int8" / "model.safetensors")
    tensors |= {key: value for key, value in bytes_of.items() if "self_attn" in key}
    save_file(tensors, tmp_path / "int4" / "model.safetensors", metadata={"format": "pt"})
    group = quantization(tmp_path / "int8")["config_groups"]["group_0"] | {"targets": ATTENTION}
    groups = quantization(tmp_path / "int4")["config_groups"] | {"group_1": group}
    edit(tmp_path / "int4", config_groups=groups, format="mixed-precision")
    return tmp_path / "int4"


@pytest.mark.parametrize(
    "targets",
    [
        ATTENTION,
        [r"re:^model\.layers\.\d+\.self_attn\.[qkvo]_proj$"],
        ["re:.*self_attn.*"],
        [f"language_model.{name}" for name in ATTENTION],
    ],
    ids=["exact", "anchored", "anywhere", "in the model's names"],
)
@torch.inference_mode()
def test_targets_in_the_names_of_the_files(mixed: Path, tmp_path: Path, targets: list[str]) -> None:
    """Those in the model's names are read, too: older versions of this library wrote them."""
    groups = quantization(mixed)["config_groups"]
    groups["group_1"]["targets"] = targets
    edit(mixed, config_groups=groups)
    model = loaded(mixed)
    assert {("self_attn" in name): module.format.kind for name, module in packed(model)} == {
        True: "int8",
        False: "int4",
    }
    if targets[0].startswith("language_model"):
        return
    assert_transformers_agrees(mixed)
    Llama4(loaded(mixed, dtype="bfloat16"), None).save_pretrained(tmp_path / "saved")
    written = quantization(tmp_path / "saved")["config_groups"].values()
    assert any(sorted(group["targets"]) == sorted(ATTENTION) for group in written)
    assert_transformers_agrees(tmp_path / "saved")


def test_a_module_that_no_group_is_for_is_named_as_in_the_files(mixed: Path) -> None:
    groups = quantization(mixed)["config_groups"]
    groups["group_0"]["targets"] = ["re:.*feed_forward.*"]
    groups["group_1"]["targets"] = ATTENTION[1:]
    edit(mixed, config_groups=groups)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.self_attn\.q_proj is quantized, but no group"):
        loaded(mixed)
