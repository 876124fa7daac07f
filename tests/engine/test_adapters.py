"""Rows of one batch with an adapter each: a request gets the tokens that it gets alone, with that adapter set."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from llama4.adapters.by_row import RowAdapters
from llama4.adapters.config import TARGETS, LoraConfig
from llama4.api import Llama4
from llama4.engine.observers import MeanHidden
from llama4.engine.scheduler import Scheduler
from llama4.errors import ArgumentError
from llama4.ops.hooks import has_hook
from tests import small_model
from tests.adapters.test_lora import random_adapter
from tests.engine.test_scheduler import (
    ARRIVALS,
    WORDS,
    _small_blocks,
    alone,
    cases,
    longest,
    question,
    run,
    tokens_read,
)

__all__ = ["_small_blocks"]

CONFIGS = {
    "a": LoraConfig(rank=3),
    "b": LoraConfig(rank=5, alpha=4.0),
    "everything": LoraConfig(rank=2, targets=tuple(TARGETS)),
    "looks": LoraConfig(rank=2, targets=("vision", "projector")),
    "attends": LoraConfig(rank=4, targets=("attention",)),
}
NAMES = (None, *CONFIGS)


def with_adapters(llm: Llama4) -> Llama4:
    for seed, (name, config) in enumerate(CONFIGS.items()):
        llm.adapters.add(name, random_adapter(llm.model, config, seed))
    return llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama4:
    directory = small_model.write(tmp_path_factory.mktemp("model"))
    return with_adapters(Llama4.from_pretrained(directory, progress=False))


def scheduler_of(llm: Llama4, **options: int | None) -> Scheduler:
    adapters = RowAdapters(llm.model, llm.adapters)
    return Scheduler(llm.runner, llm.tokenizer, adapters=adapters, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [1.0, None])
def test_a_request_gets_what_it_gets_alone(llm: Llama4, blocks: float | None) -> None:
    """With pictures, cancelled ones, shared beginnings; put back in a pool of the least size. Nothing stays."""
    rng = random.Random(round(10 * (blocks or 0)))
    given = [replace(case, adapter=rng.choice(NAMES)) for case in cases(llm, ARRIVALS, seed=4)]
    least = llm.model.new_cache().num_bytes_of(longest(given))
    scheduler = scheduler_of(llm, cache_memory=round(least * blocks) if blocks else None, max_batch=8, budget=40)
    gone = run(llm, scheduler, given, seed=1, cancelled=0.02)
    differ = []
    for i, case in enumerate(given):
        expected = alone(llm, case)
        if case.ids != (expected[: len(case.ids)] if i in gone else expected):
            differ.append((i, case.adapter))
    assert not differ
    assert blocks is None or scheduler.counts.preemptions, "nobody was put back"
    assert not any(map(has_hook, llm.model.modules()))


def test_rows_of_one_forward_differ(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that change the same modules share it."""
    sizes = []
    advance = Scheduler._advance

    def noted(self: Scheduler, requests: list, cache: object) -> list:  # type: ignore[type-arg]
        sizes.append(sorted(request.adapter.name for request in requests))
        return advance(self, requests, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "_advance", noted)
    given = [replace(question(llm, "hello", 5), adapter=name) for name in ("b", None, "a", "b", None, "looks")]
    scheduler = scheduler_of(llm, share_prefixes=False)
    for case in given:
        scheduler.add(case.request(llm))
    while scheduler.has_work:
        scheduler.step()
    assert sizes[:2] == [["", "", "looks"], ["a", "b", "b"]]
    replies = [case.ids for case in given]
    assert replies == [alone(llm, case) for case in given]
    assert len({tuple(reply) for reply in replies}) == 3, "adapters that change nothing test nothing"


def test_prefixes_do_not_cross_adapters(llm: Llama4) -> None:
    text, reads = " ".join(WORDS * 3), []
    scheduler = scheduler_of(llm)
    for name in (None, "a", "b", "a", None):
        case = replace(question(llm, text), adapter=name)
        reads.append(tokens_read(llm, scheduler, case))
        assert case.ids == alone(llm, case)
    length = case.inputs.input_ids.shape[1]
    assert reads == [length] * 3 + [length - (length - 1) // 8 * 8] * 2


def test_prefixes_do_not_cross_adapters_of_one_name(llm: Llama4) -> None:
    text, scheduler, replies = " ".join(WORDS * 3), scheduler_of(llm), []
    for seed in (20, 21):
        llm.adapters.add("new", random_adapter(llm.model, CONFIGS["a"], seed))
        case = replace(question(llm, text, 5), adapter="new")
        scheduler.add(case.request(llm))
        while scheduler.has_work:
            scheduler.step()
        replies.append(case.ids)
        assert case.ids == alone(llm, case)
    assert replies[0] != replies[1], "adapters that change nothing test nothing"


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_request_keeps_the_adapter_that_had_its_name(llm: Llama4, steps: int) -> None:
    """While it waits, is read, and decodes; beside one that came later, and is computed with what has the name now."""
    old, new = (replace(question(llm, " ".join(WORDS * 3), 9), adapter="changes") for _ in range(2))
    llm.adapters.add("changes", random_adapter(llm.model, CONFIGS["a"], 30))
    expected = [alone(llm, old)]
    scheduler = scheduler_of(llm, budget=24)
    scheduler.add(old.request(llm))
    for _ in range(steps):
        scheduler.step()
    llm.adapters.add("changes", random_adapter(llm.model, CONFIGS["everything"], 31))
    expected.append(alone(llm, new))
    assert expected[0] != expected[1], "adapters that change nothing test nothing"
    scheduler.add(new.request(llm))
    while scheduler.has_work:
        scheduler.step()
    assert [old.ids, new.ids] == expected


def test_pictures_are_seen_with_the_request_s_own(llm: Llama4) -> None:
    picture = Image.effect_noise((28, 28), 80).convert("RGB")
    found = {}
    for name in (None, "looks"):
        mean = MeanHidden()
        request = replace(question(llm, "what?", 3, picture), adapter=name).request(llm)
        request.observer = mean
        scheduler = scheduler_of(llm)
        scheduler.add(request)
        while scheduler.has_work:
            scheduler.step()
        found[name] = mean.mean_D
        llm.set_adapter(name)
        own = question(llm, "what?", 3, picture).inputs
        with torch.inference_mode():
            x_ND, _ = llm.model.hidden_states(own.input_ids, pixel_values=own.pixel_values)
        assert torch.allclose(mean.mean_D, x_ND.float().mean(0), atol=1e-5)
        llm.set_adapter(None)
    assert not torch.allclose(found[None], found["looks"], atol=1e-3)


def test_the_active_one_is_set_aside_meanwhile(llm: Llama4) -> None:
    given = [replace(question(llm, "hello", 5), adapter=name) for name in (None, "a", "b")]
    expected = [alone(llm, case) for case in given]
    llm.set_adapter("a")
    try:
        run(llm, scheduler_of(llm), given, seed=0)
        assert llm.adapters.active == "a" and llm.adapters["a"].is_attached
    finally:
        llm.set_adapter(None)
    assert [case.ids for case in given] == expected


def test_unknown_names_are_refused(llm: Llama4) -> None:
    with pytest.raises(ArgumentError, match="no adapter 'c'; those loaded: a, b, everything"):
        RowAdapters(llm.model, llm.adapters).of("c")
