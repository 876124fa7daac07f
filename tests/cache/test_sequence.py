"""The cache's memory, its formats, and what is shared, cut off and forked."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llama4.cache.batch import Batch
from llama4.cache.formats import QUANTIZED, Unquantized, resolve_format
from llama4.cache.layer import LayerCache
from llama4.config import CACHE_BLOCK, Llama4Config, TextConfig
from llama4.kernels import loader
from llama4.model.multimodal import Llama4Model

CHUNK = 512


@pytest.fixture(scope="module")
def model() -> Llama4Model:
    text = TextConfig(
        vocab_size=500, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4, attention_chunk_size=CHUNK,
        bos_token_id=1, eos_token_id=(2,), pad_token_id=0,
    )  # fmt: skip
    model = Llama4Model(Llama4Config(text=text, vision=None)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 500, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", QUANTIZED)
def test_formats_keep_what_their_bits_can(name: str) -> None:
    """Half a step of the largest magnitude, or of the number itself for fp8; bfloat16 scales add 2^-9 of that."""
    format = QUANTIZED[name]
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1, 1, 0] = 0, 1e30
    error = (format.decode(*format.encode(x), torch.float32) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    step = {"int8": largest / 127 / 2, "int4": largest / 8, "fp8": x.abs() / 16 + largest / 448 * 2**-9}[name]
    assert bool((error <= step * 1.01).all())
    assert not error[0, 0].any()
    assert not format.decode(*format.encode(torch.full((1, 64), 1e-42)), torch.float32).any(), "the scale rounds to 0"


def test_formats_are_chosen_by_name_or_dtype() -> None:
    assert resolve_format(None, torch.float32) == resolve_format("auto", torch.float32) == Unquantized(torch.float32)
    assert (
        resolve_format("bf16", torch.float32)
        == resolve_format(torch.bfloat16, torch.float32)
        == Unquantized(torch.bfloat16)
    )
    for bad in ("int3", torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"int3|int8|float8.*is not known; choose"):
            resolve_format(bad, torch.float32)


def test_a_step_on_a_cpu_makes_nothing_for_a_gpu(model: Llama4Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the slots as a tensor, nor, without kernels, block tables."""
    monkeypatch.setattr(loader, "library", lambda: None)
    cache = model.new_cache()
    model(ids(3), cache=cache)
    for owner, name in ((Batch, "slots"), (LayerCache, "block_table")):
        monkeypatch.setattr(owner, name, lambda *arguments: pytest.fail("it is not read"))
    assert model(ids(1), cache=cache).isfinite().all()


@pytest.mark.parametrize("name", [None, *QUANTIZED])
@pytest.mark.parametrize("count", [1, 256, 257, CHUNK, 4 * CHUNK + 1, 3000])
def test_bytes_are_those_of_the_formula(model: Llama4Model, name: str | None, count: int) -> None:
    cache = model.new_cache(dtype=name)
    most = 0
    for piece in ids(count).split(700, dim=1):
        model(piece, cache=cache, last_only=True)
        most = max(most, cache.num_bytes)
    C, blocks = 32, -(-count // CACHE_BLOCK)
    full = {None: 4 * C, "int8": C + 2, "fp8": C + 2, "int4": C // 2 + 2}[name]
    assert cache.layers[3].rows[0] == [] or sum(b.numel() for b in cache.layers[3].rows[0]) == 4 * blocks * 256 * full
    chunked = 3 * 4 * 4 * C * CACHE_BLOCK * min(blocks, CHUNK // CACHE_BLOCK)
    assert most <= chunked + 4 * blocks * CACHE_BLOCK * full
    assert cache.num_bytes == 4 * blocks * CACHE_BLOCK * full + 3 * 4 * 4 * C * CACHE_BLOCK * (
        -(-((count - 1) % CHUNK + 1) // CACHE_BLOCK)
    )


def test_growing_copies_nothing(model: Llama4Model) -> None:
    cache = model.new_cache()
    model(ids(600), cache=cache)
    before = [block.data_ptr() for block in cache.layers[3].rows[0]]
    model(ids(900), cache=cache)
    assert [block.data_ptr() for block in cache.layers[3].rows[0]][: len(before)] == before


@pytest.mark.parametrize("past", [100, 256, 500, 700])
def test_a_fork_shares_what_is_full_and_goes_its_own_way(model: Llama4Model, past: int) -> None:
    start, one, other = ids(past), ids(300, seed=1), ids(300, seed=2)
    cache = model.new_cache()
    model(start, cache=cache)
    alone = cache.num_bytes
    fork = cache.fork([0, 0])
    full = past // CACHE_BLOCK * CACHE_BLOCK * 4 * 32 * 4
    kept = {id(b) for layer in (cache, fork) for b in layer.layers[3].rows[0]}
    assert len(kept) == -(-past // CACHE_BLOCK) + (past % CACHE_BLOCK > 0)
    assert alone >= full
    both = model(torch.cat((one, other)), cache=fork)
    mine = model(other, cache=cache)
    for continued, logits in ((one, both[:1]), (other, both[1:]), (other, mine)):
        truth = model(torch.cat((start, continued), dim=1))[:, past:]
        torch.testing.assert_close(logits, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("length", "kept"),
    [(1300, 1300), (1299, 1299), (1030, 1030), (1024, 1024), (1000, 512), (512, 512), (100, 0), (0, 0)],
)
def test_a_cache_cut_back_goes_on_from_there(model: Llama4Model, length: int, kept: int) -> None:
    """Chunked layers have let go of all chunks but the last: one cut in an earlier one begins at its border."""
    before, after = ids(1300), ids(700, seed=1)
    cache = model.new_cache()
    model(before, cache=cache)
    untouched = cache.fork()
    assert cache.truncate(length) == kept
    logits = model(after, cache=cache)
    truth = model(torch.cat((before[:, :kept], after), dim=1))[:, kept:]
    torch.testing.assert_close(logits, truth, atol=1e-4, rtol=1e-4)
    truth = model(torch.cat((before, after), dim=1))[:, 1300:]
    torch.testing.assert_close(model(after, cache=untouched), truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("chunk", "past", "cut"), [(48, 100, 96), (48, 96, 96), (CHUNK, 1300, 1024)])
def test_at_the_border_of_a_chunk(chunk: int, past: int, cut: int) -> None:
    """A cache that ends there holds nothing of the chunk before, however it came to end there; it is forked and cut
    back like any other."""
    text = TextConfig(
        vocab_size=500, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=2, attention_chunk_size=chunk,
        bos_token_id=1, eos_token_id=(2,), pad_token_id=0,
    )  # fmt: skip
    model = Llama4Model(Llama4Config(text=text, vision=None)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    before, after = ids(past), ids(chunk + 7, seed=1)
    cache = model.new_cache()
    model(before, cache=cache)
    assert cache.truncate(cut) == cut
    several, shorter = cache.fork([0, 0]), cache.fork()
    assert shorter.truncate(cut - 5) == cut - chunk
    for each in (cache, several, shorter):
        kept = before[:, : each.lengths[0]]
        truth = model(torch.cat((kept, after), dim=1))[:, kept.shape[1] :]
        for logits in model(after.expand(each.batch_size, -1), cache=each):
            torch.testing.assert_close(logits, truth[0], atol=1e-4, rtol=1e-4)


def test_logits_are_remembered_while_their_tokens_stay(model: Llama4Model) -> None:
    cache = model.new_cache()
    logits = model(ids(100), cache=cache, last_only=True)[:, -1]
    cache.remember_logits(logits)
    model(ids(5), cache=cache)
    cut, shorter = cache.fork(), cache.fork([0])
    assert cut.truncate(100) == 100
    for same in (cache, cut, shorter):
        assert same.logits_after(100) is logits
        assert same.logits_after(105) is None
    shorter.truncate(99)
    model(ids(1), cache=shorter)
    assert shorter.lengths == [100]
    assert shorter.logits_after(100) is None
    assert cache.fork([0, 0]).logits_after(100) is None
    assert cache.logits_after(100) is logits
    cache.select_rows([0, 0])
    assert cache.logits_after(100) is None


def test_restoring_forgets_the_logits(model: Llama4Model) -> None:
    cache, other = model.new_cache(), model.new_cache()
    for each, seed in ((cache, 0), (other, 1)):
        each.remember_logits(model(ids(300, seed), cache=each, last_only=True)[:, -1])
    cache.restore(0, 300, 300, [layer.rows[0] for layer in other.layers])
    assert cache.logits_after(300) is None
    torch.testing.assert_close(model(ids(9), cache=cache), model(ids(9), cache=other), atol=0, rtol=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_cache_is_near_the_exact_one(model: Llama4Model, name: str) -> None:
    """Between pieces, and token by token; int4 keeps three significant bits of 1/8 of the largest number of a head."""
    text = ids(900)
    exact = model(text)[:, 600:].log_softmax(-1)
    cache, logits = model.new_cache(dtype=name), []
    for start, end in pairwise([0, 250, 600, *range(601, 901)]):
        logits.append(model(text[:, start:end], cache=cache))
    ours = torch.cat(logits, dim=1)[:, 600:].log_softmax(-1)
    divergence = (exact.exp() * (exact - ours)).sum(-1).mean()
    assert 0 < divergence < {"int8": 1e-4, "fp8": 1e-3, "int4": 2e-2}[name]


def test_a_forward_that_is_broken_off_marks_the_cache(model: Llama4Model) -> None:
    cache = model.new_cache()
    model(ids(10), cache=cache)
    handle = model.language_model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids(10), cache=cache)
    handle.remove()
    assert not cache.is_consistent
