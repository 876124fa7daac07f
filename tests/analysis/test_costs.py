"""Counts of bytes and FLOPs, against the model itself, what is written to disk, and counting by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llama4.analysis import costs
from llama4.cache.formats import QUANTIZED
from llama4.config import CACHE_BLOCK, PRESETS, Llama4Config, TextConfig
from llama4.model.multimodal import Llama4Model
from llama4.quantization.modules import swap_modules
from llama4.quantization.schemes import SCHEMES
from llama4.tiny import EMBEDDED
from llama4.weights.convert import quantize
from tests import small_model

SMALL = TextConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=131072,
)
"""The model of the benchmarks: 16 experts in every layer."""


def on_meta(config: Llama4Config) -> Llama4Model:
    with torch.device("meta"):
        return Llama4Model(config)


ODD = replace(small_model.config(), text=replace(small_model.config().text, attention_bias=True))
TIED = replace(small_model.config(), text=replace(small_model.config().text, tie_word_embeddings=True))


@pytest.mark.parametrize("config", [*(make() for make in PRESETS.values()), ODD, TIED], ids=[*PRESETS, "odd", "tied"])
def test_shapes_are_the_models(config: Llama4Config) -> None:
    parameters = {name: tuple(p.shape) for name, p in on_meta(config).named_parameters()}
    assert costs.parameter_shapes(config.text) == {
        name: shape for name, shape in parameters.items() if name.startswith("language_model.")
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_the_models(scheme: str) -> None:
    """Scout's weights in every scheme, to the byte."""
    config = PRESETS["scout"]()
    plan = costs.quantization_plan(config.text, scheme)
    model = on_meta(config).bfloat16()
    swap_modules(model, plan)
    assert costs.weight_bytes(config, plan) == sum(p.numel() * p.itemsize for p in model.parameters())
    assert costs.weight_bytes(config) == 2 * config.num_parameters()


@pytest.mark.parametrize("scheme", ["int4", "fp8_mixed"])
def test_bytes_are_those_on_disk(scheme: str, tmp_path: Path) -> None:
    """Within 1%: on disk an int4 matrix has its shape beside it."""
    quantize(EMBEDDED["tiny"], tmp_path / "out", scheme, progress=False)
    config = Llama4Config.from_directory(EMBEDDED["tiny"])
    size = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        size += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    counted = costs.weight_bytes(config, costs.quantization_plan(config.text, scheme))
    assert counted == pytest.approx(size, rel=0.01)


def test_by_hand() -> None:
    """Attention 1024 x (1024 + 256 + 256 + 1024), router 1024 x 16, an expert and the shared one 3 x 1024 x 2048 each,
    two norms; eight of these, a norm, the head, and a row of the embeddings."""
    matrices = 1024 * (1024 + 256 + 256 + 1024) + 1024 * 16 + 2 * 3 * 1024 * 2048
    read = 8 * (matrices + 2 * 1024) + 1024 + 32000 * 1024 + 1024
    assert costs.weight_bytes_read(SMALL) == pytest.approx(2 * read, rel=1e-12)
    assert read / 1e6 == pytest.approx(154.6, abs=0.05)
    head = 2 * 32000 * 1024
    for tokens, mega in ((512, 252), (2048, 277)):
        pairs = tokens * (tokens + 1) / 2
        flops = 2 * 8 * matrices * tokens + head + 8 * 4 * 1024 * pairs
        assert costs.prefill_flops(SMALL, tokens) == pytest.approx(flops, rel=1e-12)
        assert flops / tokens / 1e6 == pytest.approx(mega, abs=0.5)
    per_token = costs.weight_bytes_read(SMALL, costs.quantization_plan(SMALL, "int4"))
    packed = 8 * 1024 * (1024 + 256 + 256 + 1024 + 2 * 3 * 2048)
    assert per_token == pytest.approx(2 * (read - packed) + packed * (0.5 + 2 / 128), rel=1e-12)


@pytest.mark.parametrize("config", [small_model.config().text, TIED.text, PRESETS["guard4"]().text])
def test_a_prompt_costs_what_its_tokens_cost_but_for_the_head(config: TextConfig) -> None:
    head = 2 * config.vocab_size * config.hidden_size
    tokens = 3 * 32 + 5
    loop_over_experts = sum(costs.flops_per_token(config, n) for n in range(1, tokens + 1))
    assert costs.prefill_flops(config, tokens) == pytest.approx(loop_over_experts - (tokens - 1) * head, rel=1e-12)


def test_bytes_of_a_cache_by_hand() -> None:
    """Scout: 8 heads of 128, keys and values; 12 layers see all, 36 at most a chunk of 8192."""
    scout = PRESETS["scout"]().text
    token = {"auto": 2 * 8 * 128 * 2, "int8": 2 * 8 * (128 + 2), "fp8": 2 * 8 * (128 + 2), "int4": 2 * 8 * (64 + 2)}
    for name, size in token.items():
        assert costs.cache_bytes(scout, 2**20, cache_dtype=name) == 12 * size * 2**20 + 36 * 4096 * 8192
        assert costs.cache_bytes(scout, 1, cache_dtype=name) == 256 * (12 * size + 36 * 4096), "a block is taken whole"
        # A new chunk has begun, and the last one is gone.
        assert costs.cache_bytes(scout, 8193, cache_dtype=name) == 12 * size * (8192 + 256) + 36 * 4096 * 256
        assert costs.peak_cache_bytes(scout, 8193, cache_dtype=name) == 12 * size * (8192 + 256) + 36 * 4096 * 8192
    assert costs.cache_bytes_read(scout, 8193, cache_dtype="int4") == 12 * 8193 * token["int4"] + 36 * 4096
    assert costs.cache_bytes(scout, 0) == costs.peak_cache_bytes(scout, 0) == 0
    with pytest.raises(ValueError, match="cache_dtype='int3' is not known"):
        costs.cache_bytes(scout, 1, cache_dtype="int3")


@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16", *QUANTIZED])
@torch.inference_mode()
def test_bytes_of_a_cache_are_what_it_holds(cache_dtype: str) -> None:
    """At every length up to some, over chunk borders and blocks, in pieces and token by token."""
    model = small_model.model()
    cache = model.new_cache(1, None if cache_dtype == "auto" else cache_dtype)
    ids = torch.ones(1, 200, dtype=torch.long)
    for piece in (1, 30, 1, 1, 200, CACHE_BLOCK - 233, 1, 90):
        model(ids[:, :piece], cache=cache, last_only=True)
        assert cache.num_bytes == costs.cache_bytes(model.config.text, cache.lengths[0], "float32", cache_dtype)
