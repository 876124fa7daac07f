"""Dense Llama against transformers: random models of every kind, in float32.

Tolerance 1e-5 relative to the largest logit: float32 sums in another order differ by about 1e-6 here.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama4.api import Llama4
from llama4.errors import ConfigError
from llama4.families import FAMILIES, family_of_type
from llama4.families import llama as family
from llama4.model.multimodal import Llama4Model
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.convert import convert, quantize
from llama4.weights.load import load
from tests.config.test_fields import missing, of_config
from tests.parity.references import relative_error
from tests.quantization.test_checkpoints import assert_equal, same

TOLERANCE = 1e-5
VOCABULARY, WINDOW = 512, 64
IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(8))
LONG = torch.randint(0, VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(9))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
DIVISORS = {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": WINDOW, **DIVISORS}

KINDS: dict[str, dict[str, Any]] = {
    "llama-1": {"num_key_value_heads": None},
    "llama-3": {"rope_theta": 500000.0},
    "llama-3.1": {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    "smollm2": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "tie_word_embeddings": True},
    "heads-apart": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn-odd": {"rope_scaling": {**YARN, "beta_fast": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
    "longrope": {"max_position_embeddings": 4 * WINDOW, "rope_scaling": LONGROPE},
}


def config_of(kind: str) -> LlamaConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW}
    return LlamaConfig(**{**sizes, **heads, "initializer_range": 0.1, **KINDS[kind]})


@functools.cache
def reference(kind: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(kind)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama4Model, Any]:
    """Ours, loaded from what transformers wrote, and theirs."""
    directory = tmp_path_factory.mktemp(request.param)
    reference(request.param).save_pretrained(directory)
    config, source = open_checkpoint(directory)
    with torch.device("meta"):
        model = FAMILIES["llama"].build(config)
    load(model, source)
    return model.eval(), functools.partial(reference, request.param)


def theirs(model: Any, ids: Tensor) -> Tensor:
    """In one prefill, by a model that has seen no other prompt: its frequencies are those of the longest yet."""
    fresh = LlamaForCausalLM(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    logits: Tensor = fresh(ids).logits
    return logits


@torch.inference_mode()
def test_logits(pair: tuple[Llama4Model, Any]) -> None:
    ours, make = pair
    assert relative_error(ours(IDS), theirs(make(), IDS)) < TOLERANCE
    if ours.config.text.max_position_embeddings > WINDOW:
        assert relative_error(ours(LONG), theirs(make(), LONG)) < TOLERANCE


@torch.inference_mode()
def test_pieces_and_ragged_batches(pair: tuple[Llama4Model, Any]) -> None:
    """Rows of 100 and 30 tokens, each as if alone: in pieces, and token by token from the middle on."""
    ours, make = pair
    length = 100 if ours.config.text.max_position_embeddings > WINDOW else 60
    ids = torch.cat([LONG[:, :length], LONG[:, 100 - length :]])
    mask = torch.ones_like(ids)
    mask[1, : length - 30] = 0
    cache = ours.new_cache(2)
    cache.announce([length, 30])
    pieces = [length - 43, 1, 2, 30, *[1] * 10]
    logits = torch.cat(
        [
            ours(piece, cache=cache, attention_mask=mask_piece)
            for piece, mask_piece in zip(ids.split(pieces, 1), mask.split(pieces, 1), strict=True)
        ],
        dim=1,
    )
    assert relative_error(logits[:1], theirs(make(), ids[:1])) < TOLERANCE
    assert relative_error(logits[1:, -30:], theirs(make(), ids[1:, -30:])) < TOLERANCE


def test_configurations_come_back(pair: tuple[Llama4Model, Any]) -> None:
    """What we write is the same model for us, and for transformers."""
    ours, make = pair
    written = FAMILIES["llama"].write_config(ours.config)
    assert family.read_config(written) == ours.config
    back, original = LlamaConfig(**written).to_dict(), make().config.to_dict()
    for name in {*original} - {"rope_parameters", "eos_token_id", "initializer_range", "architectures", "dtype"}:
        assert back[name] == original[name], name
    rope, wanted = back["rope_parameters"], original["rope_parameters"]
    assert {name: rope.get(name) for name in wanted if name != "type"} == {
        k: v for k, v in wanted.items() if k != "type"
    }


def test_old_files() -> None:
    """Configurations of Llama 1 say neither key heads nor head_dim nor theta; transformers' defaults count."""
    old = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
    text = family.read_config({**old, "num_attention_heads": 4, "max_sequence_length": 2048, "pad_token_id": -1}).text
    assert (text.num_key_value_heads, text.head_dim, text.rope_theta, text.rms_norm_eps) == (4, 16, 10000.0, 1e-6)
    assert (text.max_position_embeddings, text.bos_token_id, text.eos_token_id) == (2048, 1, (2,))


def test_every_field_of_transformers_is_in_a_table() -> None:
    names = of_config(LlamaConfig)
    assert not missing(family.FIELDS, names)
    assert missing(family.FIELDS, {*names, "a_new_field"}) == ["a_new_field"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("num_attention_heads", 0, "num_attention_heads must be at least 1"),
        ("num_key_value_heads", 3, "must be a multiple of num_key_value_heads"),
        ("hidden_size", "wide", "hidden_size = 'wide', which must be a whole number"),
        ("rope_scaling", {"type": "mystery", "factor": 2.0}, "'mystery' is not known"),
        ("rope_scaling", {"type": "longrope", "short_factor": [1.0]}, "lacks long_factor"),
        ("rope_scaling", {**LONGROPE, "long_factor": [1.0]}, "long_factor must have 8 numbers"),
        ("rope_scaling", {"type": "yarn", "factor": 0.5}, "factor >= 1"),
        ("rope_scaling", {**YARN, "beta_slow": 5e-324}, "beta_slow = 5e-324, which must be zero or at least 1e-300"),
        ("rope_scaling", {**YARN, "mscale": 1.0, "mscale_all_dim": -10 / math.log(4)}, "mscale_all_dim .* at least 0"),
        ("rope_scaling", {**YARN, "rope_theta": 1.0}, "rope_theta must not be 1 with a scaling of type 'yarn'"),
    ],
)
def test_what_cannot_be_computed_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family.read_config({**config_of("llama-3").to_dict(), field: value})


def test_a_family_that_nobody_registered() -> None:
    with pytest.raises(ConfigError, match=r"'qwen3' is not Llama 4 or .* this library runs 'llama4' and 'llama4_text'"):
        family_of_type("qwen3")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A bf16 checkpoint wide enough for every format, as transformers writes it, and with the tables of old ones."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=512, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_theirs(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def test_read_and_written(directory: Path, tmp_path: Path) -> None:
    ours = Llama4.from_pretrained(directory, dtype="float32", progress=False)
    assert relative_error(ours.model(IDS), load_theirs(directory)(IDS).logits) < TOLERANCE
    Llama4.from_pretrained(directory, dtype="bfloat16", progress=False).save_pretrained(tmp_path / "saved")
    convert(directory, tmp_path / "converted", "hf", progress=False)
    assert same(directory, tmp_path / "saved")
    assert same(directory, tmp_path / "converted")
    assert relative_error(ours.model(IDS), load_theirs(tmp_path / "saved")(IDS).logits) < TOLERANCE


@torch.inference_mode()
def test_tables_of_rope_in_old_shards(directory: Path) -> None:
    path = directory / "model.safetensors"
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(3)}
    before = Llama4.from_pretrained(directory, dtype="float32", progress=False).model(IDS)
    save_file({**load_file(path), **tables}, path, metadata={"format": "pt"})
    assert torch.equal(Llama4.from_pretrained(directory, dtype="float32", progress=False).model(IDS), before)


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
@torch.inference_mode()
def test_quantized(directory: Path, tmp_path: Path, scheme: str) -> None:
    """The scales of q and k follow their rows."""
    quantize(directory, tmp_path / "quantized", scheme, progress=False)
    ours = Llama4.from_pretrained(tmp_path / "quantized", dtype="float32", progress=False).model
    on_load = Llama4.from_pretrained(directory, dtype="float32", quantization=scheme, progress=False).model
    assert torch.equal(ours(IDS), on_load(IDS))
    assert_equal(ours, load_theirs(tmp_path / "quantized"))
