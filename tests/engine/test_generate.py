"""Generation against slow references: full forwards without a cache, rows alone, and transformers' own `generate`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from llama4.config import PRESETS
from llama4.engine.generate import generate
from llama4.engine.prefill import piece_size, prefill
from llama4.engine.runner import ModelRunner
from llama4.engine.sampling import Sampler
from llama4.engine.tokens import Event
from llama4.errors import ContextLengthError
from llama4.families import family_of
from llama4.inputs import Inputs, Processor
from llama4.model.multimodal import Llama4Model
from llama4.text.tokenizer import Tokenizer
from tests import small_model

LONG = "the quick brown fox jumps over the lazy dog " * 4


@pytest.fixture(scope="module")
def model() -> Llama4Model:
    return small_model.model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = small_model.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    tokenizer = family_of(small_model.config()).load_tokenizer(path.parent, small_model.config())
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> Processor:
    return Processor(tokenizer, image_size=28, max_tiles=4)


def picture(seed: int, width: int, height: int) -> Image.Image:
    rng = random.Random(seed)
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def question(text: str, *pictures: Image.Image) -> list[dict[str, object]]:
    parts = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def conversations() -> list[list[dict[str, object]]]:
    """Unequal lengths, unequal numbers of pictures, some across chunks of 32 tokens."""
    return [
        question("what?", picture(0, 40, 30)),
        question(LONG),
        question("and these?", picture(1, 100, 30), picture(2, 28, 28), picture(3, 30, 200)),
        question("hi"),
    ]


def run(model: Llama4Model, tokenizer: Tokenizer, inputs: Inputs, **settings: object) -> list[list[Event]]:
    """Events by row."""
    sampler = Sampler(**{key: settings.pop(key) for key in ("temperature", "top_p", "seed") if key in settings})  # type: ignore[arg-type]
    rows: list[list[Event]] = [[] for _ in inputs.input_ids]
    for event in generate(ModelRunner(model), tokenizer, inputs, sampler=sampler, **settings):  # type: ignore[arg-type]
        rows[event.row].append(event)
    return rows


def ids(events: list[Event]) -> list[int]:
    return [event.token.id for event in events]


@torch.inference_mode()
def slow_greedy(model: Llama4Model, inputs: Inputs, steps: int) -> tuple[list[int], list[float]]:
    """One row, the whole sequence anew for every token."""
    sequence, chosen, logprobs = inputs.input_ids, [], []
    for _ in range(steps):
        last = model(sequence, pixel_values=inputs.pixel_values)[0, -1].double().log_softmax(dim=-1)
        chosen.append(int(last.argmax()))
        logprobs.append(float(last.max()))
        sequence = torch.cat([sequence, torch.tensor([[chosen[-1]]])], dim=1)
    return chosen, logprobs


@pytest.mark.parametrize("row", range(4))
def test_greedy_equals_full_forwards_without_a_cache(
    model: Llama4Model, tokenizer: Tokenizer, processor: Processor, row: int
) -> None:
    inputs = processor(conversations()[row])
    (events,) = run(model, tokenizer, inputs, max_new_tokens=40)
    expected, logprobs = slow_greedy(model, inputs, 40)
    assert ids(events) == expected
    assert [event.token.logprob for event in events] == pytest.approx(logprobs, abs=1e-4)
    assert [event.finish_reason for event in events] == [None] * 39 + ["length"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("size", [7, 64, 4096])
def test_rows_of_a_batch_equal_rows_alone(
    model: Llama4Model,
    tokenizer: Tokenizer,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, float],
    size: int,
) -> None:
    """Also when rows end at different times and the prompts go through the model in small pieces."""
    alone = [run(model, tokenizer, processor(each), max_new_tokens=24, **settings)[0] for each in conversations()]
    stop_ids = [ids(alone[0])[3], ids(alone[3])[10]]
    alone = [
        run(model, tokenizer, processor(each), max_new_tokens=24, stop_ids=stop_ids, **settings)[0]
        for each in conversations()
    ]
    assert len({len(events) for events in alone}) > 1
    monkeypatch.setattr("llama4.engine.prefill.PREFILL_TOKENS", size)
    together = run(model, tokenizer, processor(conversations()), max_new_tokens=24, stop_ids=stop_ids, **settings)
    for events, expected in zip(together, alone, strict=True):
        assert ids(events) == ids(expected)
        assert [event.text for event in events] == [event.text for event in expected]
        assert [event.token.logprob for event in events] == pytest.approx(
            [event.token.logprob for event in expected], abs=1e-4
        )
        assert events[-1].finish_reason == expected[-1].finish_reason


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
def test_memory_that_was_never_written_is_never_read(
    model: Llama4Model, tokenizer: Tokenizer, processor: Processor
) -> None:
    assert torch.empty(3).isnan().all()
    for row, conversation in zip(
        run(model, tokenizer, processor(conversations()), max_new_tokens=8), conversations(), strict=True
    ):
        assert ids(row) == slow_greedy(model, processor(conversation), 8)[0]


def test_prefill_in_pieces_fills_the_cache_as_one_piece_does(
    model: Llama4Model, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [processor([each, each]) for each in conversations()]
    whole = [prefill(model, inputs, model.new_cache(2)) for inputs in several]
    monkeypatch.setattr("llama4.engine.prefill.piece_size", lambda _: 20)
    for inputs, expected in zip(several, whole, strict=True):
        torch.testing.assert_close(prefill(model, inputs, model.new_cache(2)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype", "free", "tokens"),
    [
        ("cpu", torch.bfloat16, 1 << 40, 2048),
        ("cuda", torch.bfloat16, 1 << 40, 16384),
        ("cuda", torch.float32, 1 << 40, 2048),
        ("cuda", torch.bfloat16, 4 * 142_000 * 5000, 5000),
        ("cuda", torch.bfloat16, 0, 64),
    ],
)
def test_pieces_are_as_large_as_the_memory_allows(
    device: str, dtype: torch.dtype, free: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Scout, whose tokens take 142 kB each: the residual stream in float32 and its norm, gate, up and their product,
    what goes into the experts and comes from them, and their sum in float32."""
    monkeypatch.setattr("llama4.engine.prefill.free_memory", lambda _: free)
    scout = SimpleNamespace(config=PRESETS["scout"](), device=torch.device(device), dtype=dtype)
    assert piece_size(cast(Llama4Model, scout)) == pytest.approx(tokens, rel=0.01)


def test_transformers_generates_the_same(
    model: Llama4Model, tokenizer: Tokenizer, processor: Processor, tmp_path: Path
) -> None:
    from transformers import Llama4ForConditionalGeneration

    reference: Any = Llama4ForConditionalGeneration.from_pretrained(
        small_model.write(tmp_path), dtype=torch.float32, attn_implementation="eager"
    )
    for conversation in conversations():
        inputs = processor(conversation)
        prompt = inputs.input_ids
        found = reference.generate(
            input_ids=prompt,
            attention_mask=inputs.attention_mask,
            **({} if inputs.pixel_values is None else {"pixel_values": inputs.pixel_values}),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
        )[0, prompt.shape[1] :]
        assert ids(run(model, tokenizer, inputs, max_new_tokens=20)[0]) == found.tolist()


def test_a_stop_token_ends_the_reply_and_is_no_text(
    model: Llama4Model, tokenizer: Tokenizer, processor: Processor
) -> None:
    inputs = processor(question("hello"))
    (free,) = run(model, tokenizer, inputs, max_new_tokens=10)
    stop = ids(free)[4]
    first = ids(free).index(stop)
    (events,) = run(model, tokenizer, inputs, max_new_tokens=10, stop_ids=[stop])
    assert ids(events) == ids(free)[: first + 1]
    assert events[-1].finish_reason == "stop"
    expected = tokenizer.decode_bytes(ids(events)[:-1]).decode("utf-8", "replace")
    text = "".join(event.text for event in events)
    assert text == expected or text == expected.rstrip("\ufffd")  # a character that was cut off is left out


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_ends_the_reply_before_it(
    model: Llama4Model, tokenizer: Tokenizer, processor: Processor, length: int
) -> None:
    inputs = processor(question("hello"))
    (free,) = run(model, tokenizer, inputs, max_new_tokens=40)
    whole = "".join(event.text for event in free)
    stop = whole[9 : 9 + length]
    (events,) = run(model, tokenizer, inputs, max_new_tokens=40, stop=[stop, "never comes"])
    assert "".join(event.text for event in events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert len(events) < len(free)


# -- limits and errors ---------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_window(model: Llama4Model, tokenizer: Tokenizer, processor: Processor) -> None:
    inputs = processor.complete("7" * 49)
    for limit in (49, 50):
        with pytest.raises(ContextLengthError, match=rf"50 tokens.*holds {limit}.*max_context={limit}"):
            run(model, tokenizer, inputs, max_context=limit)
    with pytest.raises(ContextLengthError, match=r"4097 tokens.*holds 4096.*shorten"):
        run(model, tokenizer, processor.complete("7" * 4096))


def test_a_reply_is_cut_at_the_window(model: Llama4Model, tokenizer: Tokenizer, processor: Processor) -> None:
    inputs = processor.complete(["7" * 49, "7" * 45])
    first, second = run(model, tokenizer, inputs, max_context=53, max_new_tokens=5)
    assert (len(first), first[-1].finish_reason) == (3, "length")
    assert (len(second), second[-1].finish_reason) == (5, "length")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"stop": ""}, "empty"), ({"stop": ["a", ""]}, "empty")],
)
def test_bad_arguments_are_refused_at_the_call(
    model: Llama4Model, tokenizer: Tokenizer, processor: Processor, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(ModelRunner(model), tokenizer, processor.complete("x"), sampler=Sampler(), **settings)  # type: ignore[arg-type]


def test_logits_that_are_not_numbers(tokenizer: Tokenizer, processor: Processor) -> None:
    broken = small_model.model()
    with torch.no_grad():
        broken.language_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not numbers in torch\.float32"):
        run(broken, tokenizer, processor.complete("x"))


def test_features_and_patches_must_agree(model: Llama4Model, tokenizer: Tokenizer, processor: Processor) -> None:
    inputs = processor(question("what?", picture(0, 40, 30)))
    assert inputs.pixel_values is not None
    fewer = Inputs(inputs.input_ids, inputs.attention_mask, inputs.pixel_values[:-1])
    with pytest.raises(ValueError, match=r"holds \d+ <\|patch\|> tokens, but its images give \d+ features"):
        run(model, tokenizer, fewer)


def test_leaving_in_the_middle_leaves_no_trace(model: Llama4Model, tokenizer: Tokenizer, processor: Processor) -> None:
    inputs = processor(question("hello"))
    expected = run(model, tokenizer, inputs, max_new_tokens=6)
    events = generate(ModelRunner(model), tokenizer, inputs, sampler=Sampler(), max_new_tokens=6)
    next(events)
    assert not torch.is_inference_mode_enabled()  # the caller's own code in between can still train
    assert torch.is_grad_enabled()
    events.close()  # type: ignore[attr-defined]
    assert run(model, tokenizer, inputs, max_new_tokens=6) == expected
