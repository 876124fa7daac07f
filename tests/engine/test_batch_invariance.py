"""With `batch_invariant=True` a token gets the same bits, however its prompt is cut and whatever is read beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4.api import Llama4
from llama4.cache.sequence import SequenceCache
from llama4.cli.main import main
from llama4.engine.fused_cpu import FusedCpuRunner
from llama4.engine.observers import MeanHidden, Observer, PromptLogprobs
from llama4.engine.prefill import read_pieces
from llama4.engine.prompt import Piece
from llama4.engine.request import Request
from llama4.engine.runner import ModelRunner
from llama4.engine.sampling import Sampler
from llama4.engine.scheduler import Scheduler
from llama4.errors import ArgumentError
from llama4.inputs import Inputs
from llama4.kernels import cpu, loader
from llama4.model.multimodal import Llama4Model
from llama4.ops import cpu_kernels
from tests.engine.test_company import long_cases
from tests.engine.test_scheduler import cases, longest, run
from tests.families.test_mistral import write
from tests.marks import needs_kernels
from tests.parity.references import relative_error, wide_model, write_mixed

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not loader.found().level.startswith(("avx512", "amx")), reason="registers are few"),
]
FORMS = [
    *itertools.product((None, "int8", "int4"), ("float32", "bfloat16"), ("float",)),
    ("fp8", "bfloat16", "float"),
    *itertools.product(("int8", "int4"), ("bfloat16",), ("int8",)),
]
PROMPT = 260
"""Tokens: more than a block of the cache, 256, and than some chunks, of 80."""
PIECES = (1, 2, 7, 16, 64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("checkpoint") / "model", attention_chunk_size=80)


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: "-".join(map(str, form)))
def model(request: pytest.FixtureRequest, directory: Path) -> Iterator[Llama4Model]:
    scheme, dtype, activations = request.param
    options = {"quantization": scheme, "dtype": dtype, "activations": activations}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "MIN_MATRIX", 1)
        yield Llama4.from_pretrained(directory, batch_invariant=True, progress=False, **options).model


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    ids: list[int] = torch.randint(0, 490, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@torch.inference_mode()
def read(model: Llama4Model, cache: SequenceCache, prompts: Sequence[list[int]], size: int) -> list[list[Tensor]]:
    """Of each prompt the hidden states of all tokens, the logits behind the last, and what the cache holds of it. They
    end together."""
    hidden: list[list[Tensor]] = [[] for _ in prompts]
    for left in range(max(map(len, prompts)), 0, -size):
        pieces = [ids[max(len(ids) - left, 0) : max(len(ids) - left + size, 0)] for ids in prompts]
        x_ND, logits_BV = read_pieces(FusedCpuRunner(model), cache, [Piece(ids) for ids in pieces])
        for own, x in zip(hidden, x_ND.split([len(ids) for ids in pieces]), strict=True):
            own.append(x)
    return [[torch.cat(own), logits_BV[row], *held(cache, row)] for row, own in enumerate(hidden)]


def held(cache: SequenceCache, row: int) -> list[Tensor]:
    """Keys and values of each layer."""
    found = []
    for layer, window in zip(cache.layers, cache.windows, strict=True):
        slots = cache.cached_tokens(row, cache.next_position[row], window)
        found += [part for both in layer.read(row, slots, torch.float32, torch.device("cpu")) for part in both]
    return found


def are_equal(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(ours, truth, strict=True)]


def test_prompts_in_pieces(model: Llama4Model) -> None:
    """Across chunks and blocks; and as if each token were decoded."""
    (truth,) = read(model, model.new_cache(), [prompt(0)], PROMPT)
    for size in PIECES:
        (ours,) = read(model, model.new_cache(), [prompt(0)], size)
        assert all(are_equal(ours, truth)), size
    runner, cache = ModelRunner(model), model.new_cache()
    for id_ in prompt(0):
        logits_BV = runner.step(torch.tensor([id_]), cache)
    assert all(are_equal([logits_BV[0], *held(cache, 0)], truth[1:]))


def test_prompts_beside_others(model: Llama4Model) -> None:
    """Of all lengths, in pieces that fill more than a call; with keys and values in each format."""
    prompts = [prompt(seed, length) for seed, length in enumerate((PROMPT, 3, 230, 81, 160))]
    for cache_dtype in (None, "int8", "fp8", "int4"):
        together = read(model, model.new_cache(len(prompts), cache_dtype), prompts, 90)
        for i, (ids, ours) in enumerate(zip(prompts, together, strict=True)):
            (truth,) = read(model, model.new_cache(1, cache_dtype), [ids], 64)
            assert all(are_equal(ours, truth)), (i, cache_dtype)


@pytest.mark.parametrize("name", ["tiny", "random", "wide"])
def test_by_default_pieces_differ_by_rounding(name: str, directory: Path) -> None:
    """By less than a millionth of the largest logit in float32, which is what is promised; these by 0.6 at most."""
    if name == "wide":
        model = wide_model(1024)
    else:
        path = directory if name == "random" else name
        model = Llama4.from_pretrained(path, dtype="float32", progress=False).model
    ids = prompt(0, 200 if name == "wide" else PROMPT)
    (truth,) = read(model, model.new_cache(), [ids], len(ids))
    for size in (7, 70) if name == "wide" else PIECES[2:]:
        (ours,) = read(model, model.new_cache(), [ids], size)
        assert relative_error(ours[1], truth[1]) < 1e-6, size


@torch.inference_mode()
def test_by_default_rows_of_a_step_differ_by_rounding() -> None:
    """Among so many others by less than a millionth of the largest logit, whatever the weights: up to 64 rows only the
    products of experts go by tiles."""
    model = wide_model(512)
    cache = model.new_cache(64)
    read(model, cache, [prompt(row, 9) for row in range(64)], 9)
    ids_B = torch.tensor([prompt(row, 10)[9] for row in range(64)])
    alone = torch.cat([ModelRunner(model).step(ids_B[[row]], cache.fork([row])) for row in range(9)])
    assert not model.is_batch_invariant
    for rows in (2, 8, 9, 13, 24, 41, 64):
        together = ModelRunner(model).step(ids_B[:rows], cache.fork(list(range(rows))))
        assert relative_error(together[:9], alone[:rows]) < 1e-6, rows


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4", "fp8"])
def test_replies_beside_others(form: str) -> None:
    """Tokens and their log-probabilities, of prompts with pictures and without, read by the scheduler in pieces that
    begin behind what others read."""
    options = {"dtype": form} if form.endswith(("16", "32")) else {"quantization": form}
    llm = Llama4.from_pretrained("tiny", batch_invariant=True, progress=False, **options)  # type: ignore[arg-type]
    given = [*cases(llm, 6, seed=3), *long_cases(llm, 5)]
    memory = 3 * llm.model.new_cache().num_bytes_of(longest(given))
    scheduler = Scheduler(llm.runner, llm.tokenizer, cache_memory=memory, max_batch=6, budget=40)
    run(llm, scheduler, given, seed=2)
    for case in given:
        ours, case.got = case.got, []
        one = Scheduler(llm.runner, llm.tokenizer, share_prefixes=False, budget=2048)
        run(llm, one, [case], seed=0)
        assert case.got == ours
    assert scheduler.counts.prefix_hits


def test_what_is_learnt_of_a_prompt(tmp_path: Path) -> None:
    """Log-probabilities, by a head in four bits, of which products with more than 12 rows would go by tiles; and the
    mean of the hidden states."""
    assert main(["convert", "tiny", str(tmp_path / "tiny.gguf"), "--type", "q4_0"]) == 0
    llm = Llama4.from_pretrained(tmp_path / "tiny.gguf", batch_invariant=True, progress=False)
    ids = torch.tensor([prompt(1, 100)])
    inputs = Inputs(ids, torch.ones_like(ids), None)

    def read_by(observer: Observer, budget: int) -> None:
        scheduler = Scheduler(llm.runner, llm.tokenizer, budget=budget)
        limits: dict[str, Any] = {"max_new_tokens": 1, "stop_ids": (), "deliver": lambda token: None}
        scheduler.add(Request(inputs, llm.model, Sampler(), observer=observer, **limits))
        while scheduler.has_work:
            scheduler.step()

    logprobs = [PromptLogprobs(ids.shape[1], 3, llm.tokenizer.decode_bytes) for _ in range(2)]
    means = [MeanHidden() for _ in range(2)]
    for i, budget in enumerate((512, 7)):
        read_by(logprobs[i], budget)
        read_by(means[i], budget)
    assert logprobs[0].tokens == logprobs[1].tokens
    assert torch.equal(means[0].mean_D, means[1].mean_D)


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", (9, 40, 200)), ("float32", (41, 200))])
def test_tiles_of_experts_add_as_few_rows_do(dtype: str, rows: tuple[int, ...]) -> None:
    """In parts of unequal length, of which the last inputs are added one by one."""
    x_NI, w_IO = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((200, 1568), (1568, 96)))
    alone = torch.cat([cpu.linear_in_out(own, w_IO) for own in x_NI.split(1)])
    for count in rows:
        assert torch.equal(cpu.linear_in_out(x_NI[:count], w_IO), alone[:count]), count


def test_attention_in_parts() -> None:
    """So many queries and keys that what is kept of them is made in several turns."""
    H, K, C, blocks, rows = 32, 8, 128, 4, 64
    memory = torch.randn(blocks, 2, K, 256, C)
    table = torch.tensor([[block.data_ptr() for block in memory]] * rows)
    lengths_B, q_BHC = torch.arange(1, rows + 1) * 16, torch.randn(rows, H, C)
    together = cpu.attend(q_BHC, table, lengths_B, K, "unquantized")
    for row in (0, 1, 20, 41, 63):
        own = slice(row, row + 1)
        assert torch.equal(cpu.attend(q_BHC[own], table[own], lengths_B[own], K, "unquantized"), together[own])


def test_a_window_that_slides_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 16, head_dim=32)
    with pytest.raises(ArgumentError, match="batch_invariant=True does nothing here: the window of its attention sli"):
        Llama4.from_pretrained(tmp_path, batch_invariant=True, progress=False)
