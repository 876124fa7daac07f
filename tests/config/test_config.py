"""config.json as transformers writes and reads it, the forms of early files, and counts of parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers import Llama4Config as ReferenceConfig

from llama4.config import PRESETS, Llama4Config
from llama4.model.multimodal import Llama4Model
from tests.parity.references import ReferenceModel, reference_config


@pytest.mark.parametrize("maverick", [False, True])
def test_there_and_back(tmp_path: Path, maverick: bool) -> None:
    theirs = reference_config(maverick)
    ours = Llama4Config.from_dict(theirs.to_dict())
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    again = AutoConfig.from_pretrained(tmp_path)
    for name in (
        "moe_layers",
        "no_rope_layers",
        "layer_types",
        "rope_parameters",
        "head_dim",
        "attention_chunk_size",
    ):
        assert getattr(again.text_config, name) == getattr(theirs.text_config, name), name
    assert again.image_token_index == theirs.image_token_index
    assert Llama4Config.from_dict(again.to_dict()).text == ours.text


def test_rope_scaling_in_all_its_places() -> None:
    text = reference_config().to_dict()["text_config"]
    rope = text.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    old = text | {"rope_scaling": rope, "rope_theta": theta}
    new = text | {"rope_parameters": rope | {"rope_theta": theta}}
    assert Llama4Config.from_dict(old).text == Llama4Config.from_dict(new).text
    for absent in (text | {"rope_scaling": None, "rope_theta": theta}, text | {"rope_theta": theta}):
        assert Llama4Config.from_dict(absent).text.rope_scaling is None


def test_temperature_as_a_number() -> None:
    text = reference_config().to_dict()["text_config"] | {"attn_temperature_tuning": 4}
    assert Llama4Config.from_dict(text).text.attn_temperature_tuning is True


def test_missing_architectures() -> None:
    content = reference_config().to_dict()
    content.pop("architectures", None)
    assert Llama4Config.from_dict(content).vision is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "multiple of num_key_value_heads 2"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, not 0"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers must name all 4 layers"),
        ({"moe_layers": [0, 9]}, "names layers beyond"),
        ({"rope_parameters": {"rope_type": "mystery"}}, "'mystery' is not known"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.* it computes 'silu'"),
        ({"hidden_size": "wide"}, r"text_config\) has hidden_size = 'wide', which must be a whole number"),
        ({"num_experts_per_tok": 9}, "exceeds num_local_experts 4"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama4Config.from_dict(reference_config().to_dict()["text_config"] | change)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type 'mistral' is not Llama 4"):
        Llama4Config.from_dict({"model_type": "mistral"})


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        Llama4Config.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Llama4Config.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("scout", 109e9, 17e9), ("maverick", 401e9, 17e9), ("guard4", 12e9, 11e9), ("behemoth", 2e12, 288e9)],
)
def test_parameter_counts(name: str, total: float, active: float) -> None:
    """To the parameter what transformers builds (on the meta device), and the published figures."""
    config = PRESETS[name]()
    with torch.device("meta"):
        theirs = ReferenceModel(ReferenceConfig(**config.to_dict()))
        ours = Llama4Model(config)
    assert {k: v.shape for k, v in ours.named_parameters()} == {k: v.shape for k, v in theirs.named_parameters()}
    assert config.num_parameters() == sum(p.numel() for p in theirs.parameters())
    assert config.num_parameters() == pytest.approx(total, rel=0.005)
    assert config.num_active_parameters() == pytest.approx(active, rel=0.02)
