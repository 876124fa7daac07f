"""Texts that cannot fit are refused before they are read, or soon after; and no other is."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from llama4 import ContextLengthError, Llama4
from llama4.text import byte_level, prompt
from llama4.text.prompt import Piece, encode
from llama4.text.prompt_limit import PromptLimit
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import LLAMA3, LLAMA4, Vocabulary
from tests import small_model
from tests.text.test_generations import CORPUS, MODELS, texts, train

HARD = ["\U0001d400" * 99, "\u1100\u1161\u11a8" * 50, "\u212b" * 70, " " * 500, "the" * 99, "\u2581" * 99, "日本" * 30]


@pytest.mark.parametrize("name", MODELS)
def test_no_text_of_sentencepiece_has_fewer(name: str, tmp_path: Path) -> None:
    train(tmp_path / "tokenizer.model", **MODELS[name])
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    for text in [*texts(100), *HARD]:
        assert tokenizer.fewest(text) <= len(tokenizer.encode(text)), text
    assert bool(tokenizer.fewest("a")) is (name not in ("nfkc", "no-bytes"))  # where a text may lose characters


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD", None])
def test_no_text_of_bytes_has_fewer(form: str | None, tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer(BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    theirs.normalizer = getattr(normalizers, form)() if form else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([*CORPUS, "A" * 64], BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for text in [*texts(100), *HARD]:
        assert 0 < tokenizer.fewest(text) <= len(tokenizer.encode(text)) or not text, text
    content = json.loads(theirs.to_str())
    del content["model"]["vocab"]["A"], content["model"]["merges"][:]  # a byte without a token is left out
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert Tokenizer(tmp_path).fewest("A" * 10**6) == 0 == len(Tokenizer(tmp_path).encode("A"))


def test_normal_forms_shrink_a_text_by_four_at_most() -> None:
    """Of every character the longest text that it is a normal form of: each character of its decomposition, by the
    longest one that has this decomposition."""
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for form, apart in (("NFC", "NFD"), ("NFKC", "NFKD")):
        decomposed = {each: unicodedata.normalize(apart, each) for each in every}  # type: ignore[arg-type]
        longest = {parts: 0 for parts in decomposed.values() if len(parts) == 1}
        for each, parts in decomposed.items():
            if len(parts) == 1:
                longest[parts] = max(longest[parts], len(each.encode()))
        for each, parts in decomposed.items():
            if unicodedata.is_normalized(form, each):  # type: ignore[arg-type]
                assert sum(map(longest.__getitem__, parts)) <= byte_level._SHRINKS * len(each.encode()), hex(ord(each))


def test_added_tokens_may_take_more(tmp_path: Path) -> None:
    tokenizer = Tokenizer(small_model.write_tokenizer(tmp_path / "tokenizer.model"))
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    added: dict[str, Any] = {**content["added_tokens"][-1], "id": 10**4, "special": False, "content": "<long>" * 50}
    for flags, known in (({}, True), ({"rstrip": True}, False)):
        written = {**content, "added_tokens": [*content["added_tokens"], added | flags]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(written), "utf-8")
        longer, text = Tokenizer(tmp_path / "tokenizer.json"), ("<long>" * 50 + " " * 500) * 4
        assert 0 <= longer.fewest(text) <= len(longer.encode(text)) and bool(longer.fewest(text)) is known


@pytest.mark.parametrize("vocabulary", [LLAMA3, LLAMA4], ids=["llama-3", "llama-4"])
def test_parts_have_the_ids_of_the_whole(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a long text is cut."""
    tokenizer = Tokenizer(small_model.write_tokenizer(tmp_path / "tokenizer.model"), vocabulary=vocabulary)
    draw, given = random.Random(0), [*texts(200)]
    given += ["".join(draw.choices(" \n\t/'s!aA1é中\u0301\x1c\u2028\u3000", k=80)) for _ in range(300)]
    whole = [tokenizer.encode(text) for text in given]
    for size in (1, 2, 5, 20):
        monkeypatch.setattr(byte_level, "_PART", size)
        assert [tokenizer.encode(text) for text in given] == whole


def small(directory: Path) -> Tokenizer:
    return Tokenizer(small_model.write_tokenizer(directory / "tokenizer.model"))


def pieces_of_sentencepiece(directory: Path) -> Tokenizer:
    train(directory / "tokenizer.model", split_by_whitespace=True)
    return Tokenizer(directory / "tokenizer.model")


def merged(directory: Path) -> Tokenizer:
    theirs = tokenizers.Tokenizer(BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    theirs.train_from_iterator(CORPUS, BpeTrainer(vocab_size=600))
    theirs.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


@pytest.mark.parametrize("make", [small, pieces_of_sentencepiece, merged])
def test_reading_stops_soon(make: Callable[[Path], Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that may fit by its length, and does not, is not read to its end; its ids are the first of all."""
    monkeypatch.setattr(byte_level, "_PART", 100)
    monkeypatch.setattr(prompt, "_FEW", 50)
    tokenizer, text = make(tmp_path), "some words and " * 1000
    ids, whole = tokenizer.encode(text, most=200), tokenizer.encode(text)
    assert 200 < len(ids) < 400 and ids == whole[: len(ids)]
    limit = PromptLimit(len(whole) - 500, "no more")
    assert tokenizer.fewest(text) < limit.most
    with pytest.raises(ContextLengthError, match=r"the prompt has at least \d+ tokens, but no more") as error:
        encode([Piece(text)], tokenizer, limit=limit)
    assert limit.most + 50 < int(str(error.value).split()[5]) < len(whole)
    assert encode([Piece(text)], tokenizer, limit=PromptLimit(len(whole) - 50, "")).ids == whole  # a few more are told


def test_what_cannot_fit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama4.from_pretrained("tiny", max_context=64, progress=False)
    read: list[int] = []
    usual = llm.tokenizer.model.encode

    def noted(text: str, **options: Any) -> list[int]:
        read.append(len(text))
        return usual(text, **options)

    monkeypatch.setattr(llm.tokenizer.model, "encode", noted)
    text = "a" * 100_000
    asked = {"role": "user", "content": [{"type": "text", "text": text}]}
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    calls: list[Callable[[], object]] = [
        lambda: llm.chat(text),
        lambda: llm.chat([asked]),
        lambda: llm.chat("hi", tools=[tool]),
        lambda: llm.chat_batch(["hi", text]),
        lambda: llm.stream(text),
        lambda: llm.complete(text),
        lambda: llm.complete("<|eot|>" + text, special_tokens=True),
    ]
    for call in calls:
        with pytest.raises(ContextLengthError, match=r"at least \d+ tokens, but the window holds 64, .*max_context=64"):
            call()
    with pytest.raises(ContextLengthError, match=r"at least \d+ tokens, but with an answer it may have 64"):
        llm.moderate(text, guard="llama-guard-4")
    assert max(read, default=0) < 1000
    assert llm.processor([{"role": "user", "content": text}]).input_ids.shape[1] > 1000  # who only counts may
