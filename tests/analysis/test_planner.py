"""What fits where, and how long it takes, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from llama4.analysis import costs
from llama4.analysis.hardware import Rates, published_rates
from llama4.analysis.planner import (
    Deployment,
    checked_context,
    describe,
    fits,
    fp8_share,
    largest_context,
    make_deployment,
    memory,
    read_model,
    remedies,
    table,
    times,
    usable,
)
from llama4.api import Llama4
from llama4.config import PRESETS
from llama4.engine.prefill import piece_size
from llama4.model.multimodal import Llama4Model
from llama4.weights.convert import convert_to_gguf, quantize
from tests import small_model

TEN_MILLION, GIB = 10 * 2**20, 2**30


def scout(devices: int = 8, **options: str) -> Deployment:
    return make_deployment(PRESETS["scout"](), devices=devices, device_memory=80 * GIB, **options)  # type: ignore[arg-type]


def test_ten_million_tokens_on_eight_devices() -> None:
    """The window does not fit in bfloat16, 480 GiB of cache and 202 GiB of weights on 8 x 76; in fewer bits it does."""
    need = memory(scout(), TEN_MILLION)
    assert 8 * need.full_cache == 12 * 4096 * TEN_MILLION == 480 * GIB
    assert 8 * need.chunked_cache == 36 * 4096 * 8192
    small = sum(16 * 5120 + 2 * 5120 for _ in range(48)) + 5120
    split = PRESETS["scout"]().text.num_parameters() - small
    vision = PRESETS["scout"]().num_parameters() - PRESETS["scout"]().text.num_parameters()
    assert need.weights == pytest.approx(2 * (split / 8 + small + vision), rel=1e-12)
    assert not fits(scout(), TEN_MILLION)
    assert fits(scout(weights="int4", cache_dtype="fp8"), TEN_MILLION)
    assert largest_context(scout(weights="int4", cache_dtype="fp8")) == TEN_MILLION


@pytest.mark.parametrize("devices", [4, 8, 12, 16])
def test_the_largest_context_is_the_last_that_fits(devices: int) -> None:
    setup = replace(scout(devices), device_memory=60 * GIB)
    largest = largest_context(setup)
    if devices == 4 or devices == 12:
        assert memory(setup, 1).weights > 50 * GIB
    assert 0 < largest < TEN_MILLION or devices == 16
    assert largest == TEN_MILLION or memory(setup, largest).total <= usable(setup) < memory(setup, largest + 1).total


def test_weights_alone_may_be_too_much() -> None:
    assert largest_context(scout(1)) == 0


def test_devices_share_heads_and_then_the_context() -> None:
    """Eight key heads: with more devices each group has all weights and chunks, and a part of what grows."""
    assert [(scout(n).tensor_parallel, scout(n).context_parallel) for n in (1, 6, 8, 16)] == [
        (1, 1),
        (2, 3),
        (8, 1),
        (8, 2),
    ]
    eight, sixteen = memory(scout(8), TEN_MILLION), memory(scout(16), TEN_MILLION)
    assert sixteen.full_cache == eight.full_cache / 2
    assert (sixteen.weights, sixteen.chunked_cache) == (eight.weights, eight.chunked_cache)
    given = make_deployment(PRESETS["scout"](), devices=8, tensor_parallel=2)
    assert memory(given, TEN_MILLION).full_cache == eight.full_cache
    assert memory(given, TEN_MILLION).chunked_cache == 4 * eight.chunked_cache


@pytest.mark.parametrize(("devices", "tensor_parallel"), [(8, 3), (8, 16), (4, 8), (8, 0), (0, 1), (-1, None)])
def test_devices_that_do_not_divide(devices: int, tensor_parallel: int | None) -> None:
    with pytest.raises(ValueError, match=r"it must divide|devices is -?\d; it must be at least 1"):
        make_deployment(PRESETS["scout"](), devices=devices, tensor_parallel=tensor_parallel)


@pytest.mark.parametrize(
    ("name", "devices", "weights"),
    [
        ("scout", 8, "auto"),
        ("scout", 1, "auto"),
        ("scout", 1, "int4"),
        ("maverick", 8, "auto"),
        ("behemoth", 1, "int4"),
    ],
)
def test_every_remedy_is_one(name: str, devices: int, weights: str) -> None:
    """Each, taken as options of the command, fits."""
    setup = make_deployment(PRESETS[name](), weights=weights, devices=devices)
    context = setup.config.text.max_position_embeddings
    found = remedies(setup, context)
    assert found and not fits(setup, context)
    for remedy in found:
        words = remedy.split()
        options = dict(zip(words[::2], words[1::2], strict=True))
        changed = make_deployment(
            PRESETS[name](),
            weights=options.pop("--weights", weights),
            cache_dtype=options.pop("--cache", "auto"),
            devices=int(options.pop("--devices", devices)),
        )
        assert fits(changed, context) and not options, remedy


def test_times_by_hand() -> None:
    """With rates of one for one thing and no end for the others, a time is a count."""
    never = float("inf")
    setup, text = scout(8), PRESETS["scout"]().text
    products, attention = costs.prefill_flops(text, 2**20), costs.attention_flops(text, 2**20)
    assert times(setup, 2**20, Rates(never, never, 1, never, "")).prompt == pytest.approx((products - attention) / 8)
    assert times(setup, 2**20, Rates(never, never, never, 1, "")).prompt == pytest.approx(attention / 8)
    cached = costs.cache_bytes_read(text, 2**20)
    assert times(setup, 2**20, Rates(never, 1, never, never, "")).token == pytest.approx(cached / 8)
    one = make_deployment(PRESETS["scout"]())
    read = costs.weight_bytes_read(text)
    assert times(one, 2**20, Rates(1, never, never, never, "")).token == pytest.approx(read)
    # Where products cost nothing, reading all weights takes longer: for every 16,384 tokens, on a CPU for every 2048.
    whole = costs.weight_bytes(PRESETS["scout"]()) - costs.vision_bytes(PRESETS["scout"]())
    for deployment, pieces in ((one, 64), (replace(one, device_type="cpu"), 512)):
        spent = times(deployment, 2**20, Rates(1, 1, never, never, "")).prompt
        assert spent == pytest.approx(pieces * whole, rel=0.02)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "tokens"),
    [
        ("cuda", "bfloat16", 128, 16384),
        ("cuda", "float16", 256, 16384),
        ("cuda", "bfloat16", 20, 2048),
        ("cuda", "bfloat16", 264, 2048),
        ("cuda", "float32", 128, 2048),
        ("cpu", "bfloat16", 128, 2048),
        ("cpu", "float32", 20, 2048),
    ],
)
def test_pieces_of_a_prompt_are_those_that_the_library_reads(
    device: str, dtype: str, head_dim: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is memory enough; activations are of one piece."""
    config = PRESETS["scout"]()
    config = replace(config, text=replace(config.text, head_dim=head_dim))
    deployment = make_deployment(config, dtype=dtype, device_type=device)
    monkeypatch.setattr("llama4.engine.prefill.free_memory", lambda _: 1 << 50)
    model = SimpleNamespace(config=config, device=torch.device(device), dtype=getattr(torch, dtype))
    assert deployment.prefill_tokens == piece_size(cast(Llama4Model, model)) == tokens
    size = model.dtype.itemsize
    assert memory(deployment, TEN_MILLION).activations == tokens * config.text.activation_bytes(size)


def test_two_groups_halve_what_grows_and_no_more() -> None:
    rates = published_rates("h100")
    eight, sixteen = times(scout(8), TEN_MILLION, rates), times(scout(16), TEN_MILLION, rates)
    assert sixteen.token_weights == eight.token_weights
    assert eight.token_cache / 2 < sixteen.token_cache < 0.51 * eight.token_cache
    assert sixteen.prompt == pytest.approx(eight.prompt / 2)


def test_fp8_is_multiplied_in_fp8() -> None:
    assert fp8_share(scout()) == fp8_share(scout(weights="int4")) == 0
    assert 0.3 < fp8_share(scout(weights="fp8_mixed")) < fp8_share(scout(weights="fp8")) < 1


def test_a_quantized_checkpoint_is_planned_as_it_is(tmp_path: Path) -> None:
    quantize(small_model.write(tmp_path / "in"), tmp_path / "out", "fp8_mixed", progress=False)
    for name, subfolder in ((tmp_path / "out", None), (tmp_path, "out")):
        stored = make_deployment(*read_model(str(name), subfolder=subfolder))
        assert stored.plan == make_deployment(small_model.config(), weights="fp8_mixed").plan != {}
    for path in (tmp_path / "out").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match="say it with --weights"):
        read_model(str(tmp_path / "out"))
    assert read_model(str(tmp_path / "out"), weights="int8")[1] == {}


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0", "mxfp4"])
def test_a_gguf_file_is_planned_as_it_is(kind: str, tmp_path: Path) -> None:
    """All its weights, those of experts in stacks of their own."""
    convert_to_gguf(small_model.write(tmp_path / "in"), tmp_path / "out.gguf", kind, progress=False)
    deployment = make_deployment(*read_model(str(tmp_path / "out.gguf")))
    llm = Llama4.from_pretrained(tmp_path / "out.gguf", dtype=deployment.dtype, progress=False)
    held = sum(parameter.nbytes for parameter in llm.model.parameters())
    assert memory(deployment, 256).weights == pytest.approx(held, rel=0.001)
    assert (deployment.plan == {}) == (kind == "f32")


def test_experts_as_linears_take_what_stacks_do() -> None:
    """As in checkpoints of bitsandbytes."""
    text = small_model.config().text
    stacked = costs.quantization_plan(text, "int8")
    format = stacked["language_model.model.layers.1.feed_forward.experts.down_proj"]
    paths = {name.rpartition(".")[0] for name in stacked if costs.is_of_experts(name)}
    parts = [
        f"{expert}.{part}_proj.weight" for expert in range(text.num_local_experts) for part in ("gate", "up", "down")
    ]
    apart = {f"{path}.{part}": format for path in paths for part in parts}
    apart |= {name: kind for name, kind in stacked.items() if not costs.is_of_experts(name)}
    assert costs.weight_bytes_read(text, apart) == costs.weight_bytes_read(text, stacked)
    assert sum(costs.parameter_bytes(text, apart).values()) == sum(costs.parameter_bytes(text, stacked).values())


def test_a_context_beyond_the_window() -> None:
    assert checked_context(scout(), None) == TEN_MILLION
    for context in (0, TEN_MILLION + 1):
        with pytest.raises(ValueError, match=f"a context of {context:,} tokens; this model takes from 1 to 10,485,760"):
            checked_context(scout(), context)


def test_a_model_that_int4_does_not_suit_gets_other_remedies() -> None:
    setup = make_deployment(small_model.config())
    setup = replace(setup, device_memory=int(memory(setup, 512).total / 0.94))
    assert fits(setup, 512) and not fits(setup, 4096)
    assert not [remedy for remedy in remedies(setup, 4096) if "--weights" in remedy]


def test_the_table_says_what_counts() -> None:
    too_much = table(describe("scout", scout(), TEN_MILLION, published_rates("h100")))
    for words in ("DOES NOT FIT", "--cache fp8", "--devices 16", "480 GiB", "8 tensor parallel", "datasheet"):
        assert words in too_much
    fitting = describe("scout", scout(weights="int4", cache_dtype="fp8"), TEN_MILLION, published_rates("h100"))
    assert "fits in 76.0 GiB" in table(fitting) and "the whole window" in table(fitting)
    assert fitting["fits"] and not fitting["remedies"]
    assert fitting["bytes_per_device"]["total"] == pytest.approx(sum(fitting["bytes_per_device"].values()) / 2, abs=4)
