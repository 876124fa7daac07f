"""Prompts that begin as the last one did are read from where they differ."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from llama4 import Llama4
from llama4.cache.saved import load_cache
from llama4.engine.prefix_cache import fingerprint, identities
from llama4.errors import DiskError
from tests import small_model

RED, BLUE = (Image.new("RGB", (50, 40), color) for color in ((255, 0, 0), (0, 0, 255)))
TILES = 5
"""Of one of these pictures."""
DOCUMENT = "A long document says many things, one after the other. " * 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("model"))


def test_pictures_are_told_apart_in_any_dtype_and_order(directory: Path) -> None:
    llm = Llama4.from_pretrained(directory)
    content = [{"type": "image", "image": RED}, {"type": "text", "text": "what?"}]
    inputs = llm.processor([{"role": "user", "content": content}])
    assert inputs.pixel_values is not None
    (plain,) = identities(inputs, llm.model)
    others = replace(inputs, pixel_values=inputs.pixel_values.contiguous(memory_format=torch.channels_last))
    assert torch.equal(identities(others, llm.model)[0], plain)
    (narrow,) = identities(replace(inputs, pixel_values=inputs.pixel_values.bfloat16()), llm.model)
    assert bool(((narrow == plain) == (plain >= 0)).all())


@pytest.fixture
def llm(directory: Path) -> Llama4:
    return Llama4.from_pretrained(directory)


@pytest.fixture
def read(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts tokens and tiles that go through the model."""
    counts = {"tokens": 0, "tiles": 0}
    forward, encode = llm.model.forward, llm.model.encode_images

    def count_tokens(ids: Any, **options: Any) -> Any:
        mask = options.get("attention_mask")
        counts["tokens"] += int(mask.sum()) if mask is not None else ids.numel()
        return forward(ids, **options)

    def count_tiles(pixels: Any, grids: Any) -> Any:
        counts["tiles"] += len(pixels)
        return encode(pixels, grids)

    monkeypatch.setattr(llm.model, "forward", count_tokens)
    monkeypatch.setattr(llm.model, "encode_images", count_tiles)
    return counts


def user(text: str, *pictures: Image.Image) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
    }


def fresh(llm: Llama4, messages: Any, **options: Any) -> Any:
    """The answer of a model that remembers nothing."""
    kept, llm.cache = llm.cache, None
    reply = llm.chat(messages, **options)
    llm.cache = kept
    return reply


def same(reply: Any, truth: Any) -> None:
    assert reply.text == truth.text
    assert [t.logprob for t in reply.logprobs] == pytest.approx([t.logprob for t in truth.logprobs], abs=1e-4)


def test_the_next_turn_reads_what_is_new(llm: Llama4, read: dict[str, int]) -> None:
    messages = [user("What is this? " + DOCUMENT, RED)]
    first = llm.chat(messages, max_new_tokens=5)
    messages += [{"role": "assistant", "content": first.text}, user("And this?", BLUE)]
    truth = fresh(llm, messages, max_new_tokens=5)
    read.update(tokens=0, tiles=0)
    reply = llm.chat(messages, max_new_tokens=5)
    same(reply, truth)
    added = reply.usage.prompt_tokens - first.usage.prompt_tokens
    assert read["tokens"] <= added + 5
    assert read["tiles"] == TILES


def test_another_picture_is_another_prompt(llm: Llama4, read: dict[str, int]) -> None:
    llm.chat([user("What is this?", RED)], max_new_tokens=3)
    truth = fresh(llm, [user("What is this?", BLUE)], max_new_tokens=3)
    read.update(tokens=0, tiles=0)
    same(llm.chat([user("What is this?", BLUE)], max_new_tokens=3), truth)
    assert read["tiles"] == TILES


def test_the_same_prompt_gets_the_same_reply_and_is_not_read_again(llm: Llama4, read: dict[str, int]) -> None:
    first = llm.chat([user("What is this?", BLUE)], max_new_tokens=1)
    read.update(tokens=0, tiles=0)
    assert llm.chat([user("What is this?", BLUE)], max_new_tokens=1) == first
    assert read == {"tokens": 0, "tiles": 0}


def test_questions_on_one_document(llm: Llama4, read: dict[str, int]) -> None:
    llm.chat([user(DOCUMENT, RED)], max_new_tokens=1)
    document = llm.cache
    assert document is not None
    size, before = len(document), document.num_bytes
    for question in ("Who?", "Where?"):
        messages = [user(DOCUMENT + question, RED)]
        truth = fresh(llm, messages, max_new_tokens=4)
        read.update(tokens=0, tiles=0)
        llm.cache = document
        same(llm.chat(messages, max_new_tokens=4), truth)
        assert read["tokens"] < 60 + 4
        assert read["tiles"] == 0
    assert (len(document), document.num_bytes) == (size, before)
    batch = [[user(DOCUMENT + question, RED)] for question in ("Who?", "Where is it?")]
    llm.cache = None
    truths = llm.chat_batch(batch, max_new_tokens=4)
    llm.cache = document
    read.update(tokens=0, tiles=0)
    for reply, truth in zip(llm.chat_batch(batch, max_new_tokens=4), truths, strict=True):
        same(reply, truth)
    assert read["tokens"] < 2 * (60 + 4)
    assert llm.cache is document


def test_an_abandoned_stream_leaves_what_was_read(llm: Llama4) -> None:
    stream = llm.stream([user(DOCUMENT)], max_new_tokens=20)
    next(stream)
    del stream
    messages = [user(DOCUMENT + "?")]
    same(llm.chat(messages, max_new_tokens=4), fresh(llm, messages, max_new_tokens=4))


def test_a_forward_that_broke_off_is_not_gone_on_with(llm: Llama4) -> None:
    stream = llm.stream([user(DOCUMENT)], max_new_tokens=20)
    next(stream)
    handle = llm.model.language_model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    handle.remove()
    assert llm.cache is not None
    with pytest.raises(ValueError, match="broken off"):
        llm.cache.save("nowhere")
    messages = [user(DOCUMENT)]
    same(llm.chat(messages, max_new_tokens=4), fresh(llm, messages, max_new_tokens=4))


@pytest.mark.parametrize("cache_dtype", ["auto", "int8", "fp8", "int4"])
def test_saved_and_loaded(directory: Path, tmp_path: Path, cache_dtype: str) -> None:
    llm, other = (Llama4.from_pretrained(directory, cache_dtype=cache_dtype) for _ in range(2))
    llm.chat([user(DOCUMENT, RED)], max_new_tokens=1)
    assert llm.cache is not None
    llm.cache.save(tmp_path / "document.cache")
    assert [path.name for path in tmp_path.iterdir()] == ["document.cache"]
    other.load_cache(tmp_path / "document.cache")
    assert other.cache is not None
    assert other.cache.tokens == llm.cache.tokens[: len(llm.cache)]
    assert other.cache.num_bytes == llm.cache.num_bytes
    messages = [user(DOCUMENT + "Who?", RED)]
    replies = [model.chat(messages, max_new_tokens=6) for model in (llm, other)]
    assert replies[0].logprobs == replies[1].logprobs


@pytest.mark.parametrize("damage", ["missing", "more", "short", "dtype", "start", "far", "tokens", "content"])
def test_a_damaged_file_leaves_the_cache_as_it_was(llm: Llama4, tmp_path: Path, damage: str) -> None:
    llm.chat([user(DOCUMENT)], max_new_tokens=1)
    assert llm.cache is not None
    llm.cache.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    last = max(tensors.keys() - {"tokens"})
    if damage == "missing":
        del tensors[last]
    elif damage == "short":
        tensors[last] = tensors[last][:-2].clone()
    elif damage == "dtype":
        tensors[last] = tensors[last].view(torch.int8)
    elif damage == "more":
        tensors["9.0"] = tensors[last].clone()
    elif damage == "tokens":
        tensors["tokens"] = tensors["tokens"][:-1].clone()
    elif damage == "content":
        tensors[last][7] += 1
    else:
        metadata["first"] = {"start": "-5", "far": "1000000000000"}[damage]
    save_file(tensors, tmp_path / "damaged", metadata)
    cache = llm.model.new_cache()
    with pytest.raises(ValueError, match=r"damaged.*read the prompt again"):
        load_cache(tmp_path / "damaged", cache, metadata["model"], 4096)
    assert (cache.lengths, cache.num_bytes, cache.version, cache.is_consistent) == ([0], 0, 0, True)


def test_any_flipped_byte_is_noticed(llm: Llama4, tmp_path: Path) -> None:
    llm.chat([user(DOCUMENT)], max_new_tokens=1)
    assert llm.cache is not None
    llm.cache.save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = random.Random(0)
    places = [*range(0, header, 7), *(generator.randrange(header, len(data)) for _ in range(100)), len(data) - 1]
    refused = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            load_cache(tmp_path / "damaged", llm.model.new_cache(), fingerprint(llm.model), 4096)
        except ValueError:
            refused += 1
        else:  # a blank of the header became another that JSON knows
            assert json.loads(damaged[8:header]) == json.loads(data[8:header]) and place < header
    assert refused >= len(places) - 3


def test_nothing_else_of_the_memory_is_in_the_file(llm: Llama4, tmp_path: Path) -> None:
    """Neither of a longer prompt that a block was used for before, nor of what memory held before it was a block."""
    llm.chat([user("My secret is this. " * 20)], max_new_tokens=1)
    longer = llm.cache
    assert longer is not None
    for layer in longer.cache.layers:
        for block in layer.rows[0]:
            values, _ = layer.parts(block)
            values[:, :, 40:] = 123.0
    longer.cache.truncate(40)
    longer.save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", framework="pt") as file:
        for name in set(file.keys()) - {"tokens"}:
            values, _ = longer.cache.layers[0].parts(file.get_tensor(name))
            assert values[:, :, :40].any() and not values[:, :, 40:].any()


def test_any_changed_number_of_the_weights_is_another_model(llm: Llama4, tmp_path: Path) -> None:
    llm.chat([user(DOCUMENT)], max_new_tokens=1)
    assert llm.cache is not None
    llm.cache.save(tmp_path / "cache")
    for name, parameter in llm.model.named_parameters():
        place = parameter.data.view(-1)[parameter.numel() // 3 :][:1]
        before = place.clone()
        place += 1
        with pytest.raises(ValueError, match="another model"):
            llm.load_cache(tmp_path / "cache")
        assert place != before, name
        place.copy_(before)
    llm.load_cache(tmp_path / "cache")


def test_threads_that_save_at_once_leave_one_whole_file(llm: Llama4, tmp_path: Path) -> None:
    llm.chat([user(DOCUMENT)], max_new_tokens=1)
    saved = llm.cache
    assert saved is not None
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(saved.save, tmp_path / "cache") for _ in range(24)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    llm.load_cache(tmp_path / "cache")


def test_what_does_not_fit_is_refused(llm: Llama4, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    llm.chat([user(DOCUMENT)], max_new_tokens=1)
    assert llm.cache is not None
    llm.cache.save(path)
    with pytest.raises(ValueError, match="same cache_dtype"):
        Llama4.from_pretrained(directory, cache_dtype="int8").load_cache(path)
    changed = Llama4.from_pretrained(directory)
    with torch.no_grad():
        changed.model.language_model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="another model"):
        changed.load_cache(path)
    with pytest.raises(ValueError, match="cannot be read"):
        llm.load_cache(tmp_path / "nothing")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        llm.load_cache(path)
    with pytest.raises(DiskError, match="could not write"):
        llm.cache.save(tmp_path / "no" / "such" / "place")
    with pytest.raises(ValueError, match=r"cache_dtype='int3' is not known; choose"):
        Llama4.from_pretrained(directory, cache_dtype="int3")
