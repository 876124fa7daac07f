"""Requests that come and go at random: each gets the tokens that it gets alone, whatever the pool holds."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llama4.adapters.by_row import RowAdapters
from llama4.api import Llama4
from llama4.cache import layer, prefixes, sequence
from llama4.cache.pool import BlockPool
from llama4.config import RopeScaling
from llama4.engine import request as requests
from llama4.engine import scheduler as schedulers
from llama4.engine import shared_blocks
from llama4.engine.request import Delivery, Request
from llama4.engine.sampling import Sampler
from llama4.engine.scheduler import Scheduler
from llama4.engine.tokens import Token
from llama4.errors import ArgumentError
from llama4.inputs import Inputs
from tests import small_model
from tests.families import test_mistral

ARRIVALS = int(os.environ.get("LLAMA4_ARRIVALS", "16"))
"""Requests of each random test: set it to 500 for the long run."""
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "sleeps",
    "in",
    "the",
    "sun",
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 tokens: four to a chunk of the small model."""
    for module in (layer, prefixes, sequence, requests, schedulers, shared_blocks):
        monkeypatch.setattr(module, "CACHE_BLOCK", 8)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama4:
    return Llama4.from_pretrained(small_model.write(tmp_path_factory.mktemp("model")), progress=False)


@dataclass
class Case:
    """A request, and what it is given."""

    inputs: Inputs
    sampler: Sampler
    length: int
    stop_ids: tuple[int, ...] = ()
    adapter: str | None = None
    got: list[Delivery] = field(default_factory=list)

    def request(self, llm: Llama4) -> Request:
        self.got = []
        return Request(
            self.inputs,
            llm.model,
            self.sampler,
            max_new_tokens=self.length,
            stop_ids=self.stop_ids,
            deliver=self.got.append,
            adapter=RowAdapters(llm.model, llm.adapters).of(self.adapter),
        )

    @property
    def ids(self) -> list[int]:
        assert all(isinstance(each, Token) for each in self.got), self.got
        return [each.id for each in self.got if isinstance(each, Token)]


def alone(llm: Llama4, case: Case) -> list[int]:
    """What `llm.chat` gives."""
    llm.set_adapter(case.adapter)
    sampler = case.sampler
    reply = llm.chat(
        case.inputs,
        max_new_tokens=case.length,
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        top_k=sampler.top_k,
        seed=sampler.seed,
        repetition_penalty=sampler.repetition_penalty,
        presence_penalty=sampler.presence_penalty,
        frequency_penalty=sampler.frequency_penalty,
        logit_bias=dict(sampler.logit_bias),
        min_tokens=sampler.min_tokens,
    )
    llm.set_adapter(None)
    return [token.id for token in reply.logprobs]


def cases(llm: Llama4, count: int, seed: int) -> list[Case]:
    """Prompts of unequal length, with pictures or without, some beginning alike; greedy and drawn."""
    rng = random.Random(seed)
    pictures = [Image.frombytes("RGB", (w, h), rng.randbytes(3 * w * h)) for w, h in ((30, 20), (60, 90), (28, 28))]
    beginnings = [" ".join(rng.choices(WORDS, k=rng.randrange(2, 40))) for _ in range(3)]
    found = []
    for _ in range(count):
        parts: list[dict[str, Any]] = [{"type": "text", "text": rng.choice(beginnings)}]
        if rng.random() < 0.4:
            parts.append({"type": "image", "image": rng.choice(pictures)})
        parts.append({"type": "text", "text": " ".join(rng.choices(WORDS, k=rng.randrange(1, 20)))})
        drawn = {"temperature": rng.choice((0.7, 1.5)), "top_p": rng.choice((1.0, 0.9)), "seed": rng.randrange(1000)}
        sampler = Sampler(
            **(drawn if rng.random() < 0.5 else {}),  # type: ignore[arg-type]
            repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
            presence_penalty=rng.choice((0.0, 0.0, 0.5)),
            frequency_penalty=rng.choice((0.0, 0.0, -0.5)),
            logit_bias=rng.choice(((), (), ((7, 3.0), (9, -100.0)))),
            min_tokens=rng.choice((0, 0, 5)),
        )
        inputs = llm.processor([{"role": "user", "content": parts}])
        found.append(Case(inputs, sampler, rng.choice((1, 3, 10, 40)), llm.stop_ids))
    return found


def longest(cases: list[Case]) -> int:
    return max(case.inputs.input_ids.shape[1] + case.length for case in cases)


def run(llm: Llama4, scheduler: Scheduler, cases: list[Case], seed: int, cancelled: float = 0.0) -> set[int]:
    """Requests arrive at random, some are cancelled at random; -> which."""
    rng = random.Random(seed)
    waiting, left, gone = list(range(len(cases))), dict[int, Request](), set[int]()
    while waiting or scheduler.has_work:
        while waiting and (rng.random() < 0.5 or not scheduler.has_work):
            i = waiting.pop(0)
            left[i] = cases[i].request(llm)
            scheduler.add(left[i])
        if left and rng.random() < cancelled:
            i = rng.choice(sorted(left))
            scheduler.cancel(left.pop(i))
            gone.add(i)
        known = [*scheduler.waiting, *scheduler.reading, *scheduler.running.requests]
        oldest = min(known, key=lambda each: each.arrival, default=None)
        before = oldest and (len(oldest.ids), oldest.computed)
        scheduler.step()
        assert scheduler.pool.used == held(scheduler), "blocks that nobody names are held"
        computed = [*scheduler.reading, *scheduler.running.requests]
        if oldest in computed:
            assert oldest and (len(oldest.ids), oldest.computed) != before, "the oldest waits"
        assert all(a.arrival < b.arrival for a in computed for b in scheduler.waiting), "a younger one comes first"
    return gone


def held(scheduler: Scheduler) -> int:
    """Bytes of the blocks that requests and the index name."""
    caches = [*(group.cache for group in scheduler.running.groups), *(request.cache for request in scheduler.reading)]
    layers = [layer for cache in caches if cache is not None for layer in cache.layers]
    blocks = [block for layer in layers for row in layer.rows for block in row]
    blocks += [block for entry in scheduler.index._entries.values() for block in entry.layers]
    return sum({id(block): block.nbytes for block in blocks}.values())


@pytest.mark.parametrize("blocks", [1.0, 2.0, None])
def test_a_request_gets_what_it_gets_alone(llm: Llama4, blocks: float | None) -> None:
    """In a pool of the least size, in larger ones, in one without a limit."""
    given = cases(llm, ARRIVALS, seed=round(10 * (blocks or 0)))
    least = llm.model.new_cache().num_bytes_of(longest(given))
    scheduler = Scheduler(
        llm.runner, llm.tokenizer, cache_memory=round(least * blocks) if blocks else None, max_batch=6, budget=24
    )
    gone = run(llm, scheduler, given, seed=1, cancelled=0.02)
    for i, case in enumerate(given):
        expected = alone(llm, case)
        assert case.ids == expected[: len(case.ids)] and (i in gone or len(case.ids) == len(expected))
    assert blocks is None or scheduler.counts.preemptions, "nobody was put back"
    assert blocks == 1.0 or scheduler.counts.prefix_hits, "nothing was reused"
    while scheduler.index.evict():
        pass
    assert scheduler.pool.used == 0, "blocks that nobody holds"


def test_a_chunk_may_end_inside_a_block(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no prefix is shared, and the least pool still holds every request."""
    for module in (layer, prefixes, sequence, requests, schedulers, shared_blocks):
        monkeypatch.setattr(module, "CACHE_BLOCK", 12)
    given = cases(llm, 8, seed=11)
    scheduler = Scheduler(
        llm.runner,
        llm.tokenizer,
        cache_memory=llm.model.new_cache().num_bytes_of(longest(given)),
        max_batch=8,
        budget=40,
    )
    run(llm, scheduler, given, seed=1)
    assert [case.ids for case in given] == [alone(llm, case) for case in given]


def question(llm: Llama4, text: str, length: int = 3, picture: Image.Image | None = None, **sampling: Any) -> Case:
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture}] if picture is not None else []
    inputs = llm.processor([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
    return Case(inputs, Sampler(**sampling), length)


@pytest.mark.parametrize("shares", [True, False])
def test_windows_that_slide(shares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a ring that has come round a block is copied before it is written to: the least pool has room for that."""
    for module in (layer, prefixes, sequence, requests, schedulers, shared_blocks):
        monkeypatch.setattr(module, "CACHE_BLOCK", 8)
    llm = Llama4.from_pretrained(test_mistral.write(tmp_path, 24), progress=False)
    given = [question(llm, " ".join(WORDS[: 3 + 9 * i]), 20 - 9 * i) for i in range(3)]
    scheduler = Scheduler(
        llm.runner,
        llm.tokenizer,
        cache_memory=llm.model.new_cache().num_bytes_of(longest(given)),
        budget=40,
        share_prefixes=shares,
    )
    run(llm, scheduler, given, seed=1)
    assert [case.ids for case in given] == [alone(llm, case) for case in given]


def test_a_short_prompt_does_not_wait_for_a_long_one(llm: Llama4) -> None:
    """Nor does a reply: no step reads more than the budget. And the long one is read all the same."""
    scheduler = Scheduler(llm.runner, llm.tokenizer, budget=24)
    talking, long = question(llm, "hi", 100), question(llm, " ".join(WORDS * 20))
    scheduler.add(talking.request(llm))
    while not talking.got:
        scheduler.step()
    scheduler.add(long.request(llm))
    short = [question(llm, word) for word in WORDS]
    for each in short:  # as many as keep the model busy for the long one's time
        scheduler.add(each.request(llm))
        before, read = len(talking.got), scheduler.counts.prompt_tokens
        scheduler.step()
        assert len(talking.got) == before + 1, "a reply waited for a prompt"
        assert scheduler.counts.prompt_tokens - read < 24
    assert not long.got and sum(bool(each.got) for each in short) > 5, "a short prompt waited for a long one"
    length = long.inputs.input_ids.shape[1]
    while not long.got:
        scheduler.step()
    assert scheduler.counts.steps < 20 + length // 10, "the long prompt waited for short ones"


def tokens_read(llm: Llama4, scheduler: Scheduler, case: Case) -> int:
    """How many tokens of a prompt are computed where nobody else asks; the reply is there then."""
    before = scheduler.counts.prompt_tokens
    scheduler.add(case.request(llm))
    while scheduler.has_work:
        scheduler.step()
    return scheduler.counts.prompt_tokens - before


def test_full_blocks_are_shared(llm: Llama4) -> None:
    """What a prompt has in common with one that was read is not read again, while pictures are the same."""
    text = " ".join(WORDS * 3)
    red, blue = (Image.new("RGB", (28, 28), colour) for colour in ("red", "blue"))
    scheduler = Scheduler(llm.runner, llm.tokenizer)
    reads = []
    for case in (question(llm, text, 3, red), question(llm, text, 3, red), question(llm, text, 3, blue)):
        reads.append(tokens_read(llm, scheduler, case))
        assert case.ids == alone(llm, case)
    length = case.inputs.input_ids.shape[1]
    assert reads == [length, length - (length - 1) // 8 * 8, length - 8]  # before the picture stands one full block


def test_blocks_are_shared_where_rope_rotates_them_alike(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose RoPE depends on the length of the prompt."""
    text = llm.config.text
    scaling = RopeScaling(rope_type="dynamic", factor=4.0, original_max_position_embeddings=32)
    monkeypatch.setattr(llm.model, "config", replace(llm.config, text=replace(text, rope_scaling=scaling)))
    monkeypatch.setattr(llm.model.language_model.model, "config", llm.config.text)
    scheduler = Scheduler(llm.runner, llm.tokenizer, budget=24)
    given = [question(llm, " ".join(WORDS * n), 20) for n in (2, 1, 2)]
    run(llm, scheduler, given, seed=0)
    for case in given:
        assert case.ids == alone(llm, case)
    assert scheduler.counts.prefix_hits


def test_requests_that_begin_alike_share_memory(llm: Llama4) -> None:
    text = " ".join(WORDS * 3)
    scheduler = Scheduler(llm.runner, llm.tokenizer)
    first, *rest = [question(llm, f"{text} {i}", 30) for i in range(5)]
    scheduler.add(first.request(llm))
    while not first.got:
        scheduler.step()
    alone = scheduler.pool.used
    for each in rest:
        scheduler.add(each.request(llm))
    while not all(each.got for each in rest):
        scheduler.step()
    assert scheduler.pool.used < 3 * alone


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_prompts_that_come_together_have_in_common_is_read_once(llm: Llama4, is_cancelled: bool) -> None:
    """Also where the one that reads it goes, and where one begins with more of it than another."""
    beginning = " ".join(WORDS * 3)
    scheduler = Scheduler(llm.runner, llm.tokenizer, budget=24)
    given = [question(llm, text, 3) for text in (f"{beginning} 0", f"{beginning} 1", beginning[:60], f"{beginning} 2")]
    first, *rest = asked = [case.request(llm) for case in given]
    for request in asked:
        scheduler.add(request)
    done = 0
    if is_cancelled:
        scheduler.step()
        done = first.computed
        scheduler.cancel(first)
        given, asked = given[1:], rest
    keys = {request.key(i) for request in asked for i in range((request.prompt_length - 1) // 8)}
    keys -= {first.key(i) for i in range(done // 8)}
    while scheduler.has_work:
        scheduler.step()
    assert [case.ids for case in given] == [alone(llm, case) for case in given]
    ends = [request.prompt_length - (request.prompt_length - 1) // 8 * 8 for request in asked]
    read = scheduler.counts.prompt_tokens - done
    assert read == 8 * len(keys) + sum(ends)
    assert sum(request.reused for request in asked) == sum(request.prompt_length for request in asked) - read


def test_what_a_request_has_read_itself_is_not_reused(llm: Llama4) -> None:
    """Though it finds that when it was put back meanwhile; what another has read in between is."""
    scheduler = Scheduler(llm.runner, llm.tokenizer, budget=24)
    beginning = " ".join(WORDS * 3)
    first, second = (question(llm, f"{beginning} {i}").request(llm) for i in range(2))
    common = sum(first.key(i) == second.key(i) for i in range((first.prompt_length - 1) // 8))
    scheduler.add(first)
    for _ in range(2):
        scheduler.step()
        scheduler.cancel(first)
        scheduler.waiting.appendleft(first)  # as where memory is short
    own = scheduler.counts.prompt_tokens
    assert own < 8 * common
    scheduler.waiting.clear()
    scheduler.add(second)
    while scheduler.has_work:
        scheduler.step()
    assert second.reused == own == scheduler.counts.prefix_hits
    scheduler.add(first)
    while scheduler.has_work:
        scheduler.step()
    assert first.reused == 8 * common - own
    assert scheduler.counts.prefix_hits == 8 * common


def test_cancelled_requests_leave_nothing(llm: Llama4) -> None:
    """While they wait, are read, and decode."""
    for steps in (0, 1, 5):
        scheduler = Scheduler(llm.runner, llm.tokenizer, budget=24)
        request = question(llm, " ".join(WORDS * 2), 100).request(llm)
        scheduler.add(request)
        for _ in range(steps):
            scheduler.step()
        scheduler.cancel(request)
        while scheduler.index.evict():
            pass
        assert not scheduler.has_work and scheduler.pool.used == 0


def test_an_error_reaches_those_it_concerns(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that cannot be computed does not stop the others; nor do logits that are no numbers."""
    scheduler = Scheduler(llm.runner, llm.tokenizer)
    good, bad = question(llm, "hello"), question(llm, "what?", 3, Image.new("RGB", (28, 28)))
    expected = alone(llm, good)
    monkeypatch.setattr(llm.model, "encode_images", lambda *_: 1 / 0)
    run(llm, scheduler, [bad, good], seed=0)
    assert [type(each) for each in bad.got] == [ZeroDivisionError] and good.ids == expected
    with monkeypatch.context() as patch:
        patch.setattr(llm.model.language_model.lm_head, "forward", lambda x: x.new_full((len(x), 1024), torch.nan))
        run(llm, scheduler, [bad, good], seed=0)
    assert "not numbers" in str(good.got[0])
    with monkeypatch.context() as patch:
        patch.setattr(llm.model.language_model.lm_head, "forward", lambda x: 1 / 0)
        run(llm, scheduler, [good], seed=0)
    assert [type(each) for each in good.got] == [ZeroDivisionError]
    scheduler.add(good.request(llm))
    while scheduler.has_work:
        scheduler.step()
    assert good.ids == expected


def test_an_error_among_its_own_causes_is_told(llm: Llama4) -> None:
    scheduler = Scheduler(llm.runner, llm.tokenizer)
    (case,) = cases(llm, 1, 0)
    scheduler.add(case.request(llm))
    error, cause = ValueError("one"), ValueError("other")
    error.__cause__, cause.__cause__ = cause, error
    failing = threading.Thread(target=scheduler.fail_all, args=(error,), daemon=True)
    failing.start()
    failing.join(60)
    assert case.got == [error] and not scheduler.has_work


def test_a_patch_that_the_model_wrote_is_no_picture(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others, and read again after it was put back."""
    patch = llm.config.image_token_index
    bias = torch.zeros(1024).index_fill(0, torch.tensor([patch]), 1e9)
    head = llm.model.language_model.lm_head
    monkeypatch.setattr(head, "forward", lambda x: torch.nn.functional.linear(x, head.weight) + bias)
    given = [question(llm, "hello", 20), question(llm, "what?", 20, Image.new("RGB", (28, 28)))]
    scheduler = Scheduler(llm.runner, llm.tokenizer)
    for case in given:
        scheduler.add(case.request(llm))
    for _ in range(5):
        scheduler.step()
    scheduler._put_back_youngest()
    while scheduler.has_work:
        scheduler.step()
    assert [case.ids for case in given] == [[patch] * 20] * 2
    assert [reply.usage.completion_tokens for reply in llm.chat_batch(["hello", "what?"], max_new_tokens=20)] == [
        20,
        20,
    ]


def test_the_budget_is_that_of_the_device(llm: Llama4) -> None:
    """A GPU reads all experts for every piece of a prompt."""
    budgets = [schedulers.default_budget(torch.device(name)) for name in ("cpu", "cuda")]
    assert budgets == [schedulers.BUDGET, schedulers.GPU_BUDGET]
    assert Scheduler(llm.runner, llm.tokenizer).budget == schedulers.BUDGET
    assert Scheduler(llm.runner, llm.tokenizer, budget=7).budget == 7
    with pytest.raises(ArgumentError, match="budget is 0"):
        Scheduler(llm.runner, llm.tokenizer, budget=0)


def test_the_pool_bounds_the_window(llm: Llama4) -> None:
    least = llm.model.new_cache().num_bytes_of(8)
    assert Scheduler(llm.runner, llm.tokenizer, cache_memory=least).window == 8
    full = llm.model.new_cache().num_bytes_of(4096)
    assert Scheduler(llm.runner, llm.tokenizer, cache_memory=full).window == 4096
    assert Scheduler(llm.runner, llm.tokenizer, cache_memory=full - 1).window == 4088
    with pytest.raises(ArgumentError, match="the least is"):
        Scheduler(llm.runner, llm.tokenizer, cache_memory=least - 1)
    with pytest.raises(AssertionError, match="nobody made room"):
        BlockPool(10).take(11, torch.device("cpu"))
