"""The compiled step of the decoder, for any number of tokens of any number of sequences, against torch.

The truth is `Llama4Model.forward` without kernels, one token of one sequence after the other.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4.api import Llama4
from llama4.cache.batch import make_batch
from llama4.cache.sequence import SequenceCache
from llama4.cache.view import CacheView
from llama4.engine import fused_model
from llama4.engine.fused_model import Description
from llama4.errors import ArgumentError
from llama4.kernels import loader, threads
from llama4.kernels.abi import LayerStep, Tokens, check
from llama4.model.decoder import DecoderLayer
from llama4.model.multimodal import Llama4Model
from llama4.model.positions import PositionFactors
from llama4.ops import cpu_kernels
from llama4.quantization.weight import QuantizedWeight
from tests.marks import needs_kernels
from tests.parity.references import VOCABULARY, relative_error, write_mixed

pytestmark = needs_kernels
CHUNK = 288
"""Not a multiple of the cache's blocks, 256."""
MODELS: list[tuple[str | None, str]] = [
    *itertools.product((None, "int8", "int4"), ("float32", "bfloat16")),
    ("fp8", "bfloat16"),
]
STEPS = {
    "one token": [(30, 1)],
    "a draft": [(254, 4)],  # across two blocks of the cache
    "drafts of unequal length": [(5, 7), (300, 1), (251, 12), (0, 3)],
    "thirteen sequences": [(20 * i, 1) for i in range(13)],
    "sixteen sequences of four": [(17 * i, 4) for i in range(15)] + [(284, 4)],  # the last up to the end of a chunk
    "64 tokens of one": [(200, 64)],
    "a long prompt": [(0, 230)],
}
"""For each sequence, how many tokens it has in the cache and how many are new."""


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_MATRIX", 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("checkpoint") / "model", attention_chunk_size=CHUNK)


@pytest.fixture(scope="module", params=MODELS, ids=lambda given: f"{given[0]}-{given[1]}")
def model(request: pytest.FixtureRequest, directory: Path) -> Llama4Model:
    scheme, dtype = request.param
    return Llama4.from_pretrained(
        directory, quantization=scheme, dtype=dtype, activations="float", progress=False
    ).model


def ids_of(sequence: int, start: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(sequence)
    return torch.randint(0, 490, (start + count,), generator=generator)[start:]


def filled(model: Llama4Model, step: list[tuple[int, int]], cache_dtype: str | None) -> SequenceCache:
    """A cache of the sequences before the step."""
    cache, columns = model.new_cache(len(step), cache_dtype), max(past for past, _ in step)
    if columns:
        mask = torch.tensor([[t < past for t in range(columns)] for past, _ in step])
        ids = torch.stack([ids_of(b, 0, columns) for b in range(len(step))])
        model(ids, cache=cache, attention_mask=mask)
    return cache


def one_by_one(model: Llama4Model, step: list[tuple[int, int]], cache: SequenceCache) -> Tensor:
    """Logits after each token of the step, [N, V], by torch alone."""
    logits = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "library", lambda: None)
        for b, (past, new) in enumerate(step):
            own = cache.fork([b])
            logits += [model(ids_of(b, past + i, 1)[None], cache=own)[0] for i in range(new)]
    return torch.cat(logits)


def fused(
    model: Llama4Model,
    step: list[tuple[int, int]],
    cache: SequenceCache,
    outputs: list[int] | None = None,
    is_prompt: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One call: logits of the tokens that are wanted, the greedy tokens after them, and their log-probabilities."""
    news, columns = [new for _, new in step], max(new for _, new in step)
    mask = torch.tensor([[t < new for t in range(columns)] for new in news])
    batch = make_batch(
        len(step), columns, torch.device("cpu"), mask, start=cache.start, next_position=cache.next_position
    )
    ids = torch.cat([ids_of(b, past, new) for b, (past, new) in enumerate(step)])
    tables = [layer.reserve() for layer in CacheView(cache, batch).layers]
    factors = PositionFactors(model.config.text, batch.positions_N, model.dtype)
    layers = [layer for layer in model.language_model.model.layers if isinstance(layer, DecoderLayer)]
    layer_steps, lengths_N = (LayerStep * len(layers))(), {}
    for window in set(cache.windows):
        spans = batch.spans(window)
        assert len(spans) == len(step), "a step must not cross the border of a chunk"
        lengths_N[window] = torch.cat([torch.arange(s.past, s.past + s.end - s.begin) + 1 for s in spans])
    for i, (layer, table, window) in enumerate(zip(layers, tables, cache.windows, strict=True)):
        layer_steps[i] = LayerStep(
            rotations=factors.rotations[window].data_ptr() if layer.self_attn.uses_rope else 0,
            temperatures=factors.temperature_N.data_ptr() if layer.self_attn.uses_temperature else 0,
            lengths=lengths_N[window].data_ptr(),
            block_table=table.data_ptr(),
            width=table.shape[1],
            format=loader.loaded().cache_formats[cache.layers[i].format.name].number,
        )
    starts = torch.tensor([0, *itertools.accumulate(news)])
    wanted = torch.tensor(outputs if outputs is not None else range(len(ids)))
    logits = torch.empty(len(wanted), VOCABULARY, dtype=model.dtype)
    greedy, logprobs = torch.empty(len(wanted), dtype=torch.int64), torch.empty(len(wanted))
    tokens = Tokens(
        ids=ids.data_ptr(),
        sequence_starts=starts.data_ptr() if columns > 1 else 0,
        outputs=0 if outputs is None else wanted.data_ptr(),
        B=len(step),
        num_outputs=len(wanted),
        logits=logits.data_ptr(),
        greedy=greedy.data_ptr(),
        logprobs=logprobs.data_ptr(),
        is_prompt=int(is_prompt),
    )
    description = Description.of(model)
    assert description.unsupported_reason is None
    decode = loader.function("decode", model.dtype)
    check(decode(threads.count(), description.decoder, layer_steps, 0, ctypes.byref(tokens)))
    return logits, greedy, logprobs


def assert_close(model: Llama4Model, ours: Tensor, truth: Tensor, quantized_cache: bool = False) -> None:
    """In float32 but for the order of sums. In bfloat16, and where numbers are rounded to e4m3 or for the cache, a sum
    in another order is rounded the other way now and then, and may send a token to another expert; a step of e4m3 is 6%
    of a number."""
    packed = next((module for module in model.modules() if isinstance(module, QuantizedWeight)), None)
    is_fp8 = packed is not None and packed.format.kind == "fp8"
    if model.dtype == torch.float32 and not (is_fp8 or quantized_cache):
        assert relative_error(ours, truth) < 1e-5
    else:
        errors = torch.tensor([relative_error(a, b) for a, b in zip(ours.double(), truth.double(), strict=True)])
        assert errors.median() < (0.2 if is_fp8 else 2e-2)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@torch.inference_mode()
def test_equals_token_by_token(model: Llama4Model, step: list[tuple[int, int]]) -> None:
    cache = filled(model, step, None)
    truth = one_by_one(model, step, cache)
    logits, greedy, logprobs = fused(model, step, cache)
    assert_close(model, logits, truth)
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.allclose(logprobs.double(), logits.double().log_softmax(-1).amax(-1), atol=2e-6)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("step", [STEPS["drafts of unequal length"], STEPS["64 tokens of one"]], ids=["drafts", "64"])
@torch.inference_mode()
def test_quantized_caches(model: Llama4Model, step: list[tuple[int, int]], cache_dtype: str) -> None:
    """A token sees all keys as the cache holds them, also those of its own step."""
    cache = filled(model, step, cache_dtype)
    truth = one_by_one(model, step, cache)
    assert_close(model, fused(model, step, cache)[0], truth, quantized_cache=True)


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8", "int4"])
@torch.inference_mode()
def test_nan_is_written_as_nan(model: Llama4Model, cache_dtype: str) -> None:
    """Where one scale is of all numbers of a head, none of them is left."""
    cache = filled(model, [(30, 1)], cache_dtype)
    index = next(i for i, layer in enumerate(cache.layers) if layer.format.scaled)
    of_values = model.get_submodule(f"language_model.model.layers.{index}.self_attn.v_proj")
    factors = next(each for each in of_values.parameters() if each.is_floating_point())
    before = factors.clone()
    factors[5] = torch.nan
    fused(model, [(30, 1)], cache)
    factors.copy_(before)
    keys, values = next(cache.layers[index].read(0, 31, torch.float32, torch.device("cpu")))  # [K, S, C]
    assert not keys.isnan().any() and not values[:, :30].isnan().any()
    assert values[:, 30].isnan().all(dim=1).tolist() == values[:, 30].isnan().any(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("step", [STEPS["one token"], STEPS["64 tokens of one"]], ids=["one", "64"])
@torch.inference_mode()
def test_nan_in_a_router(model: Llama4Model, step: list[tuple[int, int]]) -> None:
    """Of one expert: it is chosen, as in torch, so that it shows."""
    cache = filled(model, step, None)
    weights = [weight for name, weight in model.named_parameters() if name.endswith(".router.weight")]
    before = [weight[-1].clone() for weight in weights]
    for weight in weights:
        weight[-1, 3] = torch.nan
    assert one_by_one(model, step, cache.fork()).isnan().all()
    logits, _, logprobs = fused(model, step, cache)
    for weight, own in zip(weights, before, strict=True):
        weight[-1] = own
    assert weights and logits.isnan().all() and logprobs.isnan().all()


@pytest.mark.parametrize("is_prompt", [False, True])
@torch.inference_mode()
def test_nan_in_a_token(model: Llama4Model, is_prompt: bool) -> None:
    """All that follow it are NaN, and none before it."""
    step, at = STEPS["a long prompt"], 100
    ids = ids_of(0, 0, 230)
    at += int((ids[100:, None] == ids).sum(1).argmin())  # a token that is there once
    truth = fused(model, step, filled(model, step, None), is_prompt=is_prompt)[0]
    table_VD = model.language_model.model.embed_tokens.weight
    before = table_VD[ids[at]].clone()
    table_VD[ids[at], 5] = torch.nan
    logits, _, logprobs = fused(model, step, filled(model, step, None), is_prompt=is_prompt)
    table_VD[ids[at]] = before
    assert logits[at:].isnan().all() and logprobs[at:].isnan().all()
    assert_close(model, logits[:at], truth[:at])


@torch.inference_mode()
def test_logits_of_some_tokens(model: Llama4Model) -> None:
    step = STEPS["sixteen sequences of four"]
    cache = filled(model, step, None)
    every = fused(model, step, cache.fork())
    some = fused(model, step, cache, [3, 63, 8])
    for one, other in zip(every, some, strict=True):
        assert relative_error(other.float(), one[[3, 63, 8]].float()) < (1e-5 if model.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("is_invariant", [False, True])
@torch.inference_mode()
def test_rows_do_not_change_each_other(model: Llama4Model, is_invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a bit, if that is asked for; else by less than 1e-6 in float32, and not a bit among a few."""
    if not loader.found().level.startswith(("avx512", "amx")):
        pytest.skip("registers are few")
    monkeypatch.setattr(model, "is_batch_invariant", is_invariant)
    step = [(i % 5, 1) for i in range(64)]
    cache = filled(model, step, None)
    everybody = fused(model, step, cache.fork())[0]
    few = fused(model, step[:8], cache.fork([*range(8)]))[0]
    for rows in (1, 2, 5, 13, 17, 40, 64):
        ours = fused(model, step[:rows], cache.fork([*range(rows)]))[0]
        assert torch.equal(ours[:8], few[:rows]) or not (is_invariant or rows <= 8), rows
        assert torch.equal(ours, everybody[:rows]) or not is_invariant, rows
        if model.dtype == torch.float32:
            assert relative_error(ours, everybody[:rows]) < 1e-6


@torch.inference_mode()
def test_batch_invariance_is_asked_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And refused where a step is not compiled code."""
    if loader.found().level.startswith(("avx512", "amx")):
        llm = Llama4.from_pretrained(directory, quantization="int8", batch_invariant=True, progress=False)
        description = Description.of(llm.model)
        assert description.decoder is not None and description.decoder.is_batch_invariant == 1
        with monkeypatch.context() as patch:
            patch.setattr(fused_model, "_MODULES", set())
            with pytest.raises(ArgumentError, match=r"batch_invariant=True does nothing here: layers\.0 is "):
                Llama4.from_pretrained(directory, batch_invariant=True, progress=False)
    else:
        with pytest.raises(ArgumentError, match="batch_invariant=True does nothing here: sums of the kernels for "):
            Llama4.from_pretrained(directory, batch_invariant=True, progress=False)
    with pytest.raises(ArgumentError, match="batch_invariant=True does nothing here: it computes in float64"):
        Llama4.from_pretrained(directory, dtype="float64", batch_invariant=True, progress=False)
    monkeypatch.setattr(loader, "library", lambda: None)
    with pytest.raises(ArgumentError, match="batch_invariant=True does nothing here: "):
        Llama4.from_pretrained(directory, batch_invariant=True, progress=False)


@pytest.mark.parametrize("count", [2, 3])
@torch.inference_mode()
def test_threads(directory: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads give what one gives, bit by bit, every time."""
    model = Llama4.from_pretrained(directory, dtype="float32", progress=False).model
    step = STEPS["sixteen sequences of four"]
    alone = fused(model, step, filled(model, step, None))[0]
    monkeypatch.setenv(threads.VARIABLE, str(count))
    for _ in range(3):
        assert torch.equal(fused(model, step, filled(model, step, None))[0], alone)
