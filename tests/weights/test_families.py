"""A second family, in one class and one registration: dense Llama models, against transformers.

Their files name the MLP `mlp`, and have the rows of q and k in halves of a head where this library's RoPE, like Meta's,
rotates pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama4.api import Llama4
from llama4.config import Llama4Config, TextConfig
from llama4.families import FAMILIES, family_of_type
from llama4.families.base import Family
from llama4.families.names import NameTable
from llama4.reading import read_json
from llama4.text.vocabulary import LLAMA4
from llama4.weights.convert import convert, quantize
from tests.parity.references import relative_error
from tests.quantization.test_checkpoints import assert_equal, same

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(8))


@dataclasses.dataclass(frozen=True)
class HalvesToPairs:
    """Rows of q and k: the two numbers that RoPE rotates together, half a head apart in the file, side by side here."""

    head_dim: int

    def to_model(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


class DenseLlama(Family):
    name = "dense"
    title = "Llama"
    model_types = ("llama",)
    vocabulary = LLAMA4

    def read_config(self, directory: Path) -> Llama4Config:
        content = read_json(directory / "config.json")
        fields = {field.name for field in dataclasses.fields(TextConfig)} & content.keys()
        layers = content["num_hidden_layers"]
        text = {name: content[name] for name in fields - {"rope_scaling", "eos_token_id"}} | {
            "intermediate_size_mlp": content["intermediate_size"],
            "rope_theta": content["rope_parameters"]["rope_theta"],
            "num_local_experts": 0,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_chunk_size": None,
            "no_rope_layers": (1,) * layers,
        }
        quantization = content.get("quantization_config")
        return Llama4Config(
            TextConfig(**text), None, dtype=content["dtype"], quantization_config=quantization, family=self.name
        )

    def write_config(self, config: Llama4Config) -> dict[str, Any]:
        text = config.text
        names = {field.name for field in dataclasses.fields(TextConfig)} & LlamaConfig().to_dict().keys()
        content = {name: getattr(text, name) for name in names} | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "intermediate_size": text.intermediate_size_mlp,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            "eos_token_id": list(text.eos_token_id),
            "dtype": config.dtype,
        }
        if config.quantization_config is not None:
            content["quantization_config"] = config.quantization_config
        return content

    def names(self, config: Llama4Config, keys: Collection[str] | None = None) -> NameTable:
        return NameTable(
            (
                ("model.layers.*.mlp", "language_model.model.layers.*.feed_forward"),
                ("model", "language_model.model"),
                ("lm_head", "language_model.lm_head"),
            ),
            ((r".*\.self_attn\.[qk]_proj\.weight(_scale|_packed)?", HalvesToPairs(config.text.head_dim)),),
        )


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bf16 checkpoint, as transformers writes it."""
    monkeypatch.setitem(FAMILIES, "dense", DenseLlama())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def theirs(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def test_a_second_family_is_read_and_written(directory: Path, tmp_path: Path) -> None:
    ours = Llama4.from_pretrained(directory, dtype="float32", progress=False)
    assert relative_error(ours.model(IDS), theirs(directory)(IDS).logits) < 1e-5
    Llama4.from_pretrained(directory, dtype="bfloat16", progress=False).save_pretrained(tmp_path / "saved")
    convert(directory, tmp_path / "converted", "hf", progress=False)
    assert same(directory, tmp_path / "saved")
    assert same(directory, tmp_path / "converted")
    assert relative_error(ours.model(IDS), theirs(tmp_path / "saved")(IDS).logits) < 1e-5


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
@torch.inference_mode()
def test_a_second_family_is_quantized(directory: Path, tmp_path: Path, scheme: str) -> None:
    """The scales of q and k follow their rows."""
    quantize(directory, tmp_path / "quantized", scheme, progress=False)
    ours = Llama4.from_pretrained(tmp_path / "quantized", dtype="float32", progress=False).model
    on_load = Llama4.from_pretrained(directory, dtype="float32", quantization=scheme, progress=False).model
    assert torch.equal(ours(IDS), on_load(IDS))
    assert_equal(ours, theirs(tmp_path / "quantized"))


def test_a_family_that_nobody_registered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'llama' is not Llama 4; this library runs 'llama4' and 'llama4_text'"):
        family_of_type("llama")
