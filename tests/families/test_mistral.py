"""Mistral against transformers: a window that slides, in float32. Tolerance as of dense Llama."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from llama4 import Engine
from llama4.api import Llama4
from llama4.config.window import SlidingWindow
from llama4.errors import CheckpointError, ConfigError
from llama4.families import PRESETS, family_of, mistral
from llama4.model.multimodal import Llama4Model
from llama4.ops.attention import sliding_attention
from llama4.weights.convert import convert, convert_to_gguf, quantize
from tests import small_model
from tests.config.test_fields import missing, of_config
from tests.parity.references import relative_error
from tests.quantization.test_checkpoints import assert_equal, same

TOLERANCE = 1e-5
IDS = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(8))


@functools.cache
def reference(window: int | None, **changes: Any) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 2048}
    settings = {**sizes, **heads, "initializer_range": 0.1, "eos_token_id": small_model.RANKS + 9, **changes}
    model = MistralForCausalLM(MistralConfig(sliding_window=window, **settings)).eval()
    model.lm_head.weight.data[small_model.RANKS :] = 0  # greedy replies run to their limit
    return model


def write(directory: Path, window: int | None, **changes: Any) -> Path:
    reference(window, **changes).save_pretrained(directory)
    small_model.write_tokenizer(directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module", params=[16, 1, None], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama4Model, Any]:
    directory = write(tmp_path_factory.mktemp("mistral"), request.param)
    return Llama4.from_pretrained(directory, progress=False).model, reference(request.param)


@torch.inference_mode()
def test_logits(pair: tuple[Llama4Model, Any]) -> None:
    ours, theirs = pair
    assert relative_error(ours(IDS), theirs(IDS).logits) < TOLERANCE


@pytest.mark.parametrize("pieces", [[37, 1, 2, 50, *[1] * 10], [3, 30, 67], [1] * 100], ids=["mixed", "long", "single"])
@torch.inference_mode()
def test_pieces_and_ragged_batches(pair: tuple[Llama4Model, Any], pieces: list[int]) -> None:
    """Rows of 100 and 70 tokens, each as if alone, on beyond the window."""
    ours, theirs = pair
    mask = torch.ones_like(IDS)
    mask[1, :30] = 0
    cache = ours.new_cache(2)
    parts = zip(IDS.split(pieces, 1), mask.split(pieces, 1), strict=True)
    logits = torch.cat([ours(ids, cache=cache, attention_mask=part) for ids, part in parts], dim=1)
    assert relative_error(logits[:1], theirs(IDS[:1]).logits) < TOLERANCE
    assert relative_error(logits[1:, 30:], theirs(IDS[1:, 30:]).logits) < TOLERANCE


@torch.inference_mode()
def test_sequences_that_do_not_begin_at_the_first_position(pair: tuple[Llama4Model, Any]) -> None:
    ours, theirs = pair
    cache, positions = ours.new_cache(1), torch.arange(5, 105)
    parts = zip(IDS[:1].split([20, 50, 30], 1), positions.split([20, 50, 30]), strict=True)
    logits = torch.cat([ours(ids, cache=cache, positions=part) for ids, part in parts], dim=1)
    assert relative_error(logits, theirs(IDS[:1]).logits) < TOLERANCE


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("before", [0, 3, 40])
def test_attention_against_a_mask(window: int, before: int) -> None:
    """In float64, with gradients, without a cache: keys of before come with the new ones."""
    g = torch.Generator().manual_seed(window)
    q, k, v = (torch.randn(before + 45, heads, 8, dtype=torch.float64, generator=g) for heads in (4, 2, 2))
    q.requires_grad_()
    out = sliding_attention(q, k, v, window)
    place = torch.arange(before + 45)
    hidden = (place[:, None] < place) | (place[:, None] >= place + window)
    keys = k.repeat_interleave(2, dim=1)
    scores = torch.einsum("nhc,shc->hns", q, keys) * 8**-0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = torch.einsum("hns,shc->nhc", weights, v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(out, wanted)
    (ours,) = torch.autograd.grad(out.square().sum(), q, retain_graph=True)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), q)
    torch.testing.assert_close(ours, theirs)


@torch.inference_mode()
def test_the_cache_holds_the_window(tmp_path: Path) -> None:
    model = Llama4.from_pretrained(write(tmp_path, 256), progress=False).model
    cache = model.new_cache(1)
    model(torch.randint(0, 512, (1, 700)), cache=cache)
    one = cache.layers[0].block_bytes
    assert cache.num_bytes == 2 * one
    assert [cache.num_bytes_of(length) for length in (1, 256, 257, 700)] == [2 * one, 2 * one, 4 * one, 4 * one]
    model(torch.randint(0, 512, (1, 1)), cache=cache)
    assert cache.num_bytes == 2 * one


WORDS = " ".join(f"{a}{b}" for a in "abcdefghijkl" for b in "mnopqrstuvwxyz")


@torch.inference_mode()
def theirs_greedy(model: MistralForCausalLM, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@torch.inference_mode()
def test_conversations_and_engines_beyond_the_window(tmp_path: Path) -> None:
    """The next turns, read from the cache or anew, forks of one beginning, and many at once with shared blocks."""
    llm = Llama4.from_pretrained(write(tmp_path, 512), progress=False)
    model = reference(512)

    def prompt(text: str) -> list[int]:
        return llm.processor.complete(text).input_ids[0].tolist()

    texts = [WORDS * 2 + WORDS[:300], WORDS * 2 + WORDS[:390], WORDS + WORDS[:270] + " and then", WORDS[:400]]
    assert len(prompt(texts[0])) > 768, "three blocks, of which the window has two"
    wanted = {text: theirs_greedy(model, prompt(text), 6) for text in texts}
    for text in (*texts, texts[0]):
        assert [token.id for token in llm.complete(text, max_new_tokens=6).logprobs] == wanted[text]
    kept = llm.cache
    assert kept is not None
    beginning = kept.cache.fork()
    longer = llm.processor.complete(texts[0])
    ids = longer.input_ids[0].tolist() + wanted[texts[0]]
    assert kept.cache.lengths[0] >= len(prompt(texts[0]))
    for token in (7, 300):  # two that go on from one beginning do not write into each other's window
        cache = beginning.fork()
        known = ids[: cache.lengths[0]]
        logits = [llm.model(torch.tensor([[token]]), cache=cache)[0, -1] for token in (token, 9, 11)]
        reference_logits = model(torch.tensor([[*known, token, 9, 11]])).logits[0, -3:]
        assert relative_error(torch.stack(logits), reference_logits) < TOLERANCE
    with Engine(llm, cache_memory="64MiB", max_batch=3) as engine:
        for _ in range(2):
            streams = [engine.stream(llm.processor.complete(text), max_new_tokens=6) for text in texts]
            for stream in streams:
                stream.open(may_wait=True)
            for text, stream in zip(texts, streams, strict=True):
                for _ in stream:
                    pass
                assert [token.id for token in stream.reply.logprobs] == wanted[text]
        assert [stream.request.reused for stream in streams] == [768, 768, 512, 256]


def test_a_step_of_compiled_code_until_the_window_slides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 512}
    llm = Llama4.from_pretrained(write(tmp_path, 24, **changes), progress=False)
    model = reference(24, **changes)
    text = "What is it?"
    ids = llm.processor.complete(text).input_ids[0].tolist()
    assert len(ids) < 16
    found = [token.id for token in llm.complete(text, max_new_tokens=20).logprobs]
    assert found == theirs_greedy(model, ids, 20)
    if llm.runner.choose(llm.model.new_cache()).name == "fused CPU":
        assert "the window of attention slides" in caplog.text


@torch.inference_mode()
def test_read_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write(tmp_path / "model", 16)
    llm = Llama4.from_pretrained(directory, progress=False)
    llm.save_pretrained(tmp_path / "saved")
    convert(directory, tmp_path / "converted", "hf", progress=False)
    assert same(directory, tmp_path / "saved") and same(directory, tmp_path / "converted")
    back = MistralForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert relative_error(llm.model(IDS), back(IDS).logits) < TOLERANCE
    caplog.clear()
    convert_to_gguf(directory, tmp_path / "a.gguf", "f32", progress=False)
    assert "otherwise than llama4: it assumes that tokens see all before them, not the last 16" in caplog.text
    back = Llama4.from_pretrained(tmp_path / "a.gguf", dtype="float32", progress=False)
    assert (back.config.family, back.config.text.sliding_window) == ("mistral", 16)
    assert relative_error(back.model(IDS), llm.model(IDS)) < TOLERANCE
    with pytest.raises(CheckpointError, match=r"no field for .*sliding_window = 16"):
        convert(directory, tmp_path / "meta", "meta", progress=False)


@torch.inference_mode()
def test_quantized(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", 16, head_dim=32)
    quantize(directory, tmp_path / "quantized", "int8", progress=False)
    ours = Llama4.from_pretrained(tmp_path / "quantized", dtype="float32", progress=False).model
    assert_equal(ours, MistralForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32).eval())


read_config = mistral.MistralFamily().config_of


def test_configurations() -> None:
    assert not missing(mistral.FIELDS, of_config(MistralConfig))
    old: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": 99,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    text = read_config({**old, "num_key_value_heads": 2}).text
    assert (text.sliding_window, text.window(0), text.head_dim) == (4096, SlidingWindow(4096), 16)
    assert MistralConfig(**old).sliding_window == 4096
    assert read_config({**old, "num_key_value_heads": 2, "sliding_window": None}).text.window(0) is None
    for field, value in {"sliding_window": 0, "layer_types": ["full_attention"], "attention_bias": True}.items():
        with pytest.raises(ConfigError, match=field):
            read_config({**old, "num_key_value_heads": 2, field: value})


PUBLISHED = {"mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.2": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552}
"""As the model cards of their safetensors say."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name: str) -> None:
    config = PRESETS[name]()
    assert config.num_parameters() == PUBLISHED[name]
    written = family_of(config).write_config(config)
    assert read_config(written).text == config.text
    assert MistralConfig(**written).sliding_window == config.text.sliding_window
    assert json.dumps(written)
