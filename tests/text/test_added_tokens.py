"""Added tokens against transformers' tokenizers on the same files, which leave special tokens alone when they are told
to split them."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoTokenizer

from llama4 import Llama4
from llama4.text.added_tokens import AddedToken, AddedTokenSplitter
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_files import byte_alphabet
from llama4.text.vocabulary import PATTERN, special_token_names
from tests import small_model

SPECIAL = ["<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>", "<|patch|>", "<ctl>", "<|a b|>"]
TEXT = [
    "<SQL>",
    "<SQ",
    "SQL>",
    "ctl",
    "cat",
    "c",
    " ",
    "  <x>",
    "<x> ",
    "é",
    "日本",
    "<SQL><SQL>",
    "t|><|e",
    "a\n",
    "the",
]
PARTS = [
    *SPECIAL,
    *TEXT,
    " ",
    "  ",
    "\n",
    "\u3000",
    "\x1c",
    "_",
    "a",
    "th",
    "e",
    "the cat",
    "½",
    "Ⓐ",
    "\u200d",
    "日",
    "x.",
    "1",
]


VOCABULARY = {character: byte for byte, character in byte_alphabet().items()} | {"th": 256, "the": 257, "<y>": 258}


def write(directory: Path, added: list[dict[str, Any]], **files: Any) -> Path:
    """A tokenizer of bytes and the merges t+h, th+e, and what stands beside it."""
    directory.mkdir(exist_ok=True)
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": ["t h", "th e"], "ignore_merges": True},
    }
    files.setdefault("tokenizer_config", {})["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, value in ({"tokenizer": content} | files).items():
        (directory / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return directory


def token(i: int, content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": i, "content": content} | defaults | flags


def random_flags(rng: random.Random, content: str) -> dict[str, bool]:
    flags = {name: rng.random() < 0.25 for name in ("single_word", "lstrip", "rstrip")}
    flags["lstrip"] &= not content[0].isspace()  # after one with rstrip, tokenizers would panic
    return flags | {"normalized": rng.random() < 0.5, "special": content in SPECIAL}


def random_files(rng: random.Random) -> dict[str, Any]:
    """Some of the tokens, with random flags, in tokenizer.json, and some of them again with others beside it."""
    contents = [*SPECIAL, *rng.sample(TEXT, rng.randint(1, len(TEXT)))]
    rng.shuffle(contents)
    fresh = [content for content in contents if content not in VOCABULARY]
    ids = VOCABULARY | {content: len(VOCABULARY) + i for i, content in enumerate(fresh)}
    added = [token(ids[content], content, **random_flags(rng, content)) for content in contents]
    files: dict[str, Any] = {"added": added, "tokenizer_config": {"eos_token": "<|eot|>"}}
    if rng.random() < 0.5:
        again = [token(t["id"], t["content"], **random_flags(rng, t["content"])) for t in added if rng.random() < 0.7]
        decoder = {str(t.pop("id")): t for t in again}
        files["tokenizer_config"]["added_tokens_decoder"] = decoder
    return files


def strings(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(count)]


def test_thousands_of_strings_as_transformers(tmp_path: Path) -> None:
    rng, found = random.Random(0), 0
    for i in range(40):
        directory = write(tmp_path / str(i), **random_files(rng))
        ours = Tokenizer(directory)
        theirs = AutoTokenizer.from_pretrained(directory, split_special_tokens=True)
        assert ours.special_tokens == {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special}
        text_ids = {each.id for each in ours.added_tokens if not each.special}
        for text in strings(rng, 150):
            ids = ours.encode(text)
            assert ids == theirs.encode(text, add_special_tokens=False), (i, text)
            assert not set(ids) & set(ours.special_tokens.values())
            found += len(text_ids.intersection(ids))
    assert found > 5000  # what is compared does hold such tokens


OLDER: dict[str, dict[str, Any]] = {
    "roles in tokenizer_config.json": {"tokenizer_config": {"eos_token": "<end>", "image_token": "<pic>"}},
    "roles in both, as AddedToken": {
        "tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<SQL>", "lstrip": True}},
        "special_tokens_map": {"eos_token": {"content": "<end>", "lstrip": True, "normalized": False}},
    },
    "older lists": {
        "added_tokens": {"<end>": 262, "<new>": 263, "<ctl>": 264},
        "special_tokens_map": {"pad_token": "<ctl>", "extra_special_tokens": ["<pic>"]},
        "tokenizer_config": {"pad_token": "<SQL>"},
    },
    "added_tokens_decoder silences the others": {
        "tokenizer_config": {
            "added_tokens_decoder": {"260": {"content": "<SQL>", "rstrip": True}, "263": {"content": "<new>"}},
            "eos_token": "<SQL>",
        },
        "special_tokens_map": {"eos_token": "<end>"},
        "added_tokens": {"<newer>": 264},
    },
}


@pytest.mark.parametrize("name", OLDER)
def test_files_beside_the_tokenizer_count_as_in_transformers(name: str, tmp_path: Path) -> None:
    added = [token(259, "<|eot|>", True), token(260, "<SQL>"), token(261, "<pic>"), token(262, "<end>")]
    directory = write(tmp_path, added, **json.loads(json.dumps(OLDER[name])))
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory, split_special_tokens=True)
    assert ours.special_tokens == {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert {t.content: t.id for t in ours.added_tokens} == theirs.get_added_vocab()
    for text in ("a <SQL> b", " <pic>", "x <end> y", "<new><newer>", "<ctl> <|eot|>"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    if theirs.eos_token is not None:
        assert ours.eos_id == theirs.eos_token_id
    if theirs.pad_token is not None:
        assert ours.pad_id == theirs.pad_token_id


def test_the_checkpoints_own_names_of_first_last_and_padding(tmp_path: Path) -> None:
    added = [token(i, name, True) for i, name in enumerate(["<s>", "</s>", "<|eot|>"], 259)]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "the", "unk_token": None}
    ours = Tokenizer(write(tmp_path, added, tokenizer_config=names))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert [ours.bos_id, ours.eos_id, ours.pad_id] == [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    write(tmp_path, added, tokenizer_config={"bos_token": "<nothing>"})
    with pytest.raises(ValueError, match=r"bos_token in tokenizer_config\.json .* is '<nothing>'"):
        _ = Tokenizer(tmp_path).bos_id
    assert Tokenizer(write(tmp_path, added)).eos_id == 261  # Llama 4's name where the files are silent


def test_no_flag_makes_a_control_token_text(tmp_path: Path) -> None:
    added = [token(259, "<|header_start|>"), token(260, "<|reserved_special_token_3|>"), token(261, "<SQL>")]
    ours = Tokenizer(write(tmp_path, added))
    assert ours.special_tokens == {"<|header_start|>": 259}
    assert ours.encode("<|header_start|>")[0] == ord("<")
    assert ours.encode("<|reserved_special_token_3|><SQL>") == [260, 261]


def test_a_tokenizer_model_with_added_tokens_is_saved_as_transformers_reads_it(tmp_path: Path) -> None:
    small_model.write_tokenizer(tmp_path / "tokenizer.model")
    free = {small_model.RANKS + 100: {"content": "<SQL>", "lstrip": True, "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": free}))
    ours = Tokenizer(tmp_path, num_special_tokens=small_model.SPECIAL)
    assert ours.vocab_size == small_model.RANKS + small_model.SPECIAL
    ids = ours.encode("drop  <SQL>x<|eot|>")
    assert ids.count(small_model.RANKS + 100) == 1 and ours.decode(ids) == "drop<SQL>x<|eot|>"
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", split_special_tokens=True)
    assert theirs.encode("drop  <SQL>x<|eot|>", add_special_tokens=False) == ids
    assert Tokenizer(tmp_path / "saved" / "tokenizer.json").added_tokens == ours.added_tokens


@pytest.mark.parametrize("stop", [None, "L><S"])
def test_a_reply_shows_added_tokens_and_hides_special_ones(stop: str | None, tmp_path: Path) -> None:
    directory = small_model.write(tmp_path)
    added = small_model.RANKS + 100
    decoder = {added: {"content": "<SQL>", "special": False}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    llm = Llama4.from_pretrained(directory)
    assert llm.processor([{"role": "user", "content": "a<SQL>b"}]).input_ids.tolist()[0].count(added) == 1

    def always(i: int) -> Callable[..., torch.Tensor]:
        return lambda _module, _inputs, logits: logits + 1e4 * (torch.arange(logits.shape[-1]) == i)

    hook = llm.model.language_model.lm_head.register_forward_hook(always(added))
    stream = llm.stream("hi", max_new_tokens=3, stop=stop)
    assert "".join(stream) == stream.reply.text == ("<SQL><SQL><SQL>" if stop is None else "<SQ")
    hook.remove()
    llm.model.language_model.lm_head.register_forward_hook(always(llm.tokenizer.special("<|image|>")))
    assert llm.chat("and?", max_new_tokens=3).text == ""


def test_words_and_spaces_are_those_of_tokenizers(tmp_path: Path) -> None:
    added = [token(259, "<w>", single_word=True), token(260, "<l>", lstrip=True)]
    library = tokenizers.Tokenizer.from_file(str(write(tmp_path, added) / "tokenizer.json"))
    ours = AddedTokenSplitter(AddedToken(**each) for each in added)
    all_of = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and unicodedata.category(chr(i)) != "Cn"]
    many = ("Lo", "Co")  # 240,000 ideographs, syllables and private characters: some of them
    characters = [c for i, c in enumerate(all_of) if unicodedata.category(c) not in many or i % 200 == 0]
    for mark, i in (("<w>", 259), ("<l>", 260)):
        found = library.encode_batch([c + mark for c in characters], add_special_tokens=False)
        for character, theirs in zip(characters, found, strict=True):
            parts = list(ours.split(character + mark))
            assert (i in parts, parts == [i]) == (i in theirs.ids, theirs.ids == [i]), hex(ord(character))


def test_without_added_tokens_a_text_is_not_looked_through() -> None:
    text = "<|eot|>" * 3
    (piece,) = AddedTokenSplitter([AddedToken(0, "<|eot|>", special=True, normalized=False)]).split(text)
    assert piece is text


def test_ten_megabytes_are_split_in_time() -> None:
    names = [AddedToken(i, name, special=True, normalized=False) for i, name in enumerate(special_token_names())]
    splitter = AddedTokenSplitter([*names, AddedToken(5000, "<SQL>", lstrip=True, normalized=False)])
    text = "<div class='a'>Some <b>text</b> and <|more|> of it</div> " * 180_000 + " " * 1_000_000 + "<SQL>"
    start = time.process_time()
    assert list(splitter.split(text)) == [text[:-5].rstrip(), 5000]
    assert time.process_time() - start < 20  # 0.5 s on an idle core; a pattern of all names takes 30 s


@pytest.mark.parametrize(
    ("added", "files", "message"),
    [
        ([{"id": 259}], {}, "tokenizer.json holds the added token"),
        ([token(259, "x") | {"lstrip": "yes"}], {}, "flag is neither true nor false"),
        ([token(259, "<x>"), token(259, "<z>")], {}, "id 259 to both '<x>' and '<z>'"),
        ([token(1, "<x>")], {}, "id 1 to both"),
        ([], {"tokenizer_config": {"added_tokens_decoder": [1]}}, "tokenizer_config.json holds"),
        ([], {"tokenizer_config": {"bos_token": 7}}, r"bos_token in .*tokenizer_config.json is 7"),
        ([], {"added_tokens": {"<x>": "one"}}, "added_tokens.json holds the added token"),
    ],
)
def test_damaged_files_are_named(
    added: list[dict[str, Any]], files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(write(tmp_path, added, **files))
