"""Bytes and operations, against counts by hand, the modules themselves, and torch's own counter."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama4 import Llama4
from llama4.analysis import costs
from llama4.bench import roofline
from llama4.bench.peak_rates import PeakRates
from llama4.config import PRESETS, TextConfig
from llama4.model.experts import LoopExperts
from llama4.model.multimodal import Llama4Model
from llama4.ops import cpu_kernels
from llama4.quantization.plan import make_plan
from llama4.quantization.weight import QuantizedWeight
from llama4.vision.config import VisionConfig
from llama4.vision.encoder import VisionModel
from tests import small_model

SMALL = TextConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2048,
    intermediate_size_mlp=4096,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_local_experts=16,
    attention_chunk_size=8192,
)
"""947 M parameters, Scout's logic."""
EXPERT = 3 * 1024 * 2048
LAYER = 1024 * (1024 + 256 + 256) + 1024 * 1024 + 16 * 1024 + EXPERT  # attention, router, shared expert
HEAD = 32000 * 1024


def test_a_decoded_token_by_hand() -> None:
    assert roofline.active_numbers(SMALL) == 8 * (LAYER + EXPERT) + HEAD == 154_533_888
    work = roofline.decode(SMALL, {}, torch.bfloat16, [100], experts=1)
    cache = 8 * 101 * 2 * 4 * 64 * 2
    assert work.bytes == 2 * 154_533_888 + cache
    assert work.flops == 2 * 154_533_888 + 8 * 101 * 4 * 16 * 64
    assert work.seconds(PeakRates(gemm=1e15, memory=48e9)) == pytest.approx(1 / 155, rel=0.01)


def test_four_rows_share_all_but_their_experts() -> None:
    met = roofline.expected_experts(SMALL, 4)
    assert met == pytest.approx(3.64, abs=0.005)
    work = roofline.decode(SMALL, {}, torch.bfloat16, [0] * 4, met)
    assert work.bytes == pytest.approx(2 * (8 * LAYER + HEAD + met * 8 * EXPERT) + 4 * 8 * 2 * 4 * 64 * 2)
    assert roofline.expected_experts(PRESETS["guard4"]().text, 4) == 0


@pytest.mark.parametrize(("tokens", "megaflops"), [(512, 252), (2048, 277)])
def test_a_prompt_by_hand(tokens: int, megaflops: int) -> None:
    work = roofline.prefill(SMALL, {}, torch.bfloat16, tokens)
    seen = 8 * tokens * (tokens + 1) // 2
    assert work.flops == tokens * 2 * 8 * (LAYER + EXPERT) + 2 * HEAD + seen * 4 * 16 * 64
    assert work.flops / tokens / 1e6 == pytest.approx(megaflops, abs=1)


@pytest.mark.parametrize("name", ["maverick", "guard4", "tiny"])
def test_matrices_are_those_of_the_model(name: str) -> None:
    """All parameters of the decoder but norms and embeddings; with those, the count of active ones."""
    text = PRESETS[name]().text
    with torch.device("meta"):
        model = Llama4Model(PRESETS[name](), LoopExperts)
    others = ("norm.weight", "layernorm.weight", "embed_tokens.weight")
    expected = {
        key: tuple(parameter.shape)
        for key, parameter in model.named_parameters()
        if key.startswith("language_model.") and not key.endswith(others)
    }
    assert roofline.matrices(text) == expected
    rest = (2 * text.num_hidden_layers + 1) * text.hidden_size + text.vocab_size * text.hidden_size
    assert roofline.active_numbers(text) + rest == text.num_active_parameters()


def test_chunks_end_what_a_query_sees() -> None:
    text = small_model.config().text  # chunks of 32, layer 3 sees all
    positions = [5, 31, 32, 70]
    slow = {None: 0, 32: 0}
    for position in positions:
        slow[None] += sum(key <= position for key in range(100))
        slow[32] += sum(key <= position and key // 32 == position // 32 for key in range(100))
    assert [roofline.keys_seen(text, layer, positions) for layer in (0, 3)] == [slow[32], slow[None]]
    assert roofline.attention_flops(text, positions) == 4 * 4 * 12 * (3 * slow[32] + slow[None])


def test_packed_weights_have_the_bytes_they_have() -> None:
    """4.125 bits with a scale in bfloat16 for 128 weights; the embedded model's are counted one by one."""
    shapes = roofline.matrices(SMALL)
    plan = make_plan("int4", shapes)
    quantized = sum(math.prod(shapes[name]) for name in plan)
    whole = sum(math.prod(shape) for shape in shapes.values()) - quantized
    packed = roofline.weight_bytes(SMALL, plan, torch.bfloat16, experts=16)
    assert packed == quantized * (4 + 16 / 128) / 8 + whole * 2

    llm = Llama4.from_pretrained("tiny", quantization="int8", dtype="bfloat16")
    text = llm.config.text
    plan = make_plan("int8", roofline.matrices(text))
    modules = [module for module in llm.model.modules() if isinstance(module, QuantizedWeight)]
    assert len(modules) == len(plan)
    held = sum(part.numel() * part.element_size() for module in modules for part in module.parameters())
    shapes = {name: shape for name, shape in roofline.matrices(text).items() if name in plan}
    assert sum(costs.stored_bytes(shape, plan[name], 2) for name, shape in shapes.items()) == held


def counted(run: object) -> int:
    """Operations of products with matrices, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()  # type: ignore[operator]
    products = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
    return sum(flops for operation, flops in counter.get_flop_counts()["Global"].items() if operation in products)


def test_products_of_a_prompt_as_torch_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_MATRIX", 1 << 60)  # or kernels multiply, which torch does not count
    model, tokens = small_model.model(), 40
    ids = torch.randint(0, small_model.RANKS, (1, tokens), generator=torch.Generator().manual_seed(0))
    text = model.config.text
    mine = roofline.prefill(text, {}, torch.float32, tokens).flops - roofline.attention_flops(text, range(tokens))
    assert counted(lambda: model(ids, last_only=True)) == mine


def test_products_of_the_vision_tower_as_torch_counts_them() -> None:
    config = small_model.config().vision
    assert isinstance(config, VisionConfig)
    model, tiles = VisionModel(config), 3
    pixels = torch.zeros(tiles, 3, config.image_size, config.image_size)
    attention = 4 * tiles * config.num_hidden_layers * (config.num_patches + 1) ** 2 * config.hidden_size
    assert counted(lambda: model(pixels)) == roofline.vision(config, tiles).flops - attention
    with_projection = roofline.vision(config, tiles, 48).flops
    features = tiles * config.tokens_per_tile
    assert with_projection - roofline.vision(config, tiles).flops == 2 * features * config.vision_output_dim * 48
