"""The tokenizer against Meta's own on the genuine file, and against the `tokenizers` library on files cut from it."""

from __future__ import annotations

import argparse
import base64
import inspect
import json
import random
import string
import time
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import llama_models.llama4.tokenizer as meta
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama4.text.byte_level import GPT2, RankedBytes
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import PATTERN, special_token_names
from tests.drawn import drawn

GENUINE = Path(meta.__file__).with_name("tokenizer.model")
TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock.",
    "  two  spaces\t\ttabs\r\n\r\n  new lines \n",
    "naïve café — ½ Ⅷ ٣٤ 日本語テキスト 한국어 ไทย नमस्ते",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u200d\ufeff\x00\x1c",
    "def f(x):\n    return x ** 2  # comment///\n\n\n",
    "<|begin_of_text|><|eot|> is text <|patch|><|image|>",
    "DON'T we'll I'VE",
]


@cache  # hypothesis does not go with fixtures
def load_genuine() -> Tokenizer:
    return Tokenizer(GENUINE)


@pytest.fixture(scope="session")
def genuine() -> Tokenizer:
    return load_genuine()


@pytest.fixture(scope="session")
def reference() -> meta.Tokenizer:
    return meta.Tokenizer.get_instance()


@pytest.fixture(scope="session")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The first 1200 ranks of the genuine vocabulary as tokenizer.model, and as a tokenizer.json which the library
    `tokenizers` wrote, with merges found by replaying those of lower rank."""
    directory = tmp_path_factory.mktemp("small")
    lines = GENUINE.read_bytes().splitlines()[:1200]
    (directory / "tokenizer.model").write_bytes(b"\n".join(lines))
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in visible}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in alphabet)}
    vocabulary = {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            _, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            left, right = ("".join(alphabet[b] for b in part) for part in parts)
            merges.append((left, right))
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(meta.Tokenizer.O200K_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    names = meta.BASIC_SPECIAL_TOKENS + meta.LLAMA4_SPECIAL_TOKENS
    library.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names[:128]])
    library.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.model", directory / "tokenizer.json"


def test_special_tokens_are_metas(genuine: Tokenizer, reference: meta.Tokenizer) -> None:
    assert genuine.special_tokens == reference.special_tokens
    assert genuine.vocab_size == reference.n_words == 202048
    assert genuine.bos_id == reference.bos_id
    assert genuine.pad_id == reference.pad_id
    assert sorted(genuine.stop_ids) == sorted(reference.stop_tokens)
    assert reference.O200K_PATTERN == PATTERN


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_meta_does(text: str, genuine: Tokenizer, reference: meta.Tokenizer) -> None:
    ids = genuine.encode(text)
    assert ids == reference.encode(text, bos=False, eos=False)
    assert genuine.decode(ids) == text
    assert not set(ids) & set(genuine.special_tokens.values())


@drawn(200)
@given(st.text(max_size=60))
def test_any_text_encodes_as_meta_does(text: str) -> None:
    ours = load_genuine()
    assert ours.encode(text) == meta.Tokenizer.get_instance().encode(text, bos=False, eos=False)
    assert ours.decode(ours.encode(text)) == text


def many_strings() -> Iterator[str]:
    """All of Unicode in runs of 128 (surrogates apart), Python's own source line by line, and mixtures of white space,
    numbers, emoji, names of special tokens and words."""
    rng = random.Random(0)
    for start in range(0, 0x110000, 128):
        if not 0xD800 <= start < 0xE000:
            block = [chr(code) for code in range(start, start + 128)]
            middle = rng.choice(["", " ", " the ", "\n"])
            yield "".join(rng.choices(block, k=20)) + middle + "".join(rng.sample(block, 12))
    source = [line for module in (argparse, random, string, json) for line in inspect.getsource(module).splitlines()]
    yield from source[:1500]
    parts = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "1", "23", "456", "7890", "x", "Word", "'s", "'LL"]
    parts += ["é", "ß", "日本", "नमस्ते", "한국", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "e\u0301", "//", "==", "..."]
    parts += special_token_names(100)[::7]
    for _ in range(1500):
        yield "".join(rng.choices(parts, k=rng.randint(1, 25)))


def test_ten_thousand_strings_as_both_references(genuine: Tokenizer, reference: meta.Tokenizer) -> None:
    library = TikTokenConverter(str(GENUINE), pattern=reference.O200K_PATTERN, extra_special_tokens=[]).converted()
    strings = list(many_strings())
    assert len(strings) > 10_000
    for text, expected in zip(strings, library.encode_batch(strings, add_special_tokens=False), strict=True):
        ids = genuine.encode(text)
        assert ids == expected.ids == reference.encode(text, bos=False, eos=False), repr(text)
        assert genuine.decode(ids) == text


def test_both_files_give_the_ids_of_the_tokenizers_library(small_files: tuple[Path, Path]) -> None:
    from_model = Tokenizer(small_files[0], num_special_tokens=128)
    from_json = Tokenizer(small_files[1])
    library = tokenizers.Tokenizer.from_file(str(small_files[1]))
    assert from_model.special_tokens == from_json.special_tokens
    assert from_model.vocab_size == from_json.vocab_size == library.get_vocab_size()
    rng = random.Random(0)
    words = [rng.choice(["the", "Ströme", "ing", "int", " ", "\n", "x", "42", "==", "日"]) for _ in range(5000)]
    for text in [*(t for t in TEXTS if "<|" not in t), "".join(words)]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert from_model.encode(text) == expected
        assert from_json.encode(text) == expected
    assert Tokenizer(small_files[0].parent).path == small_files[1]


@pytest.mark.parametrize(
    ("pattern", "behavior", "invert"),
    [
        (
            r"(?i:'s|'t|'re|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s",
            "Isolated",
            False,
        ),
        (GPT2, "Isolated", False),
        (r"\p{L}+", "Isolated", False),
        (r"\p{L}+|\p{N}{1,3}(?=\s)", "Removed", True),
    ],
)
def test_patterns_that_are_not_llamas(
    pattern: str, behavior: str, invert: bool, small_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """They are split by in Python: whether or not a text is covered by matches, as the library does."""
    content = json.loads(small_files[1].read_text("utf-8"))
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split |= {"pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours, library = Tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    assert isinstance(ours.model, RankedBytes)
    old = unicodedata.ucd_3_2_0  # the libraries know different versions of Unicode
    known = [chr(i) for i in range(0x1FB00) if old.category(chr(i)) not in ("Cn", "Cs")]
    dice = random.Random(0)
    anything = ("".join(dice.choices(known[: dice.choice((300, 5000, len(known)))], k=40)) for _ in range(150))
    for text in (*TEXTS, *anything):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, text


def test_saved_tokenizer_is_the_same_in_transformers(small_files: tuple[Path, Path], tmp_path: Path) -> None:
    ours = Tokenizer(small_files[0], num_special_tokens=128)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if "<|" not in text:
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    for name, i in ours.special_tokens.items():
        assert theirs.convert_tokens_to_ids(name) == i
    assert theirs.eos_token_id == ours.special("<|eot|>")
    assert theirs.pad_token_id == ours.pad_id
    again = Tokenizer(tmp_path)
    again.save(tmp_path)  # onto itself
    assert again.special_tokens == ours.special_tokens
    assert again.encode(TEXTS[4]) == ours.encode(TEXTS[4])
    assert (tmp_path / "tokenizer.model").read_bytes() == small_files[0].read_bytes()


def test_a_smaller_file_keeps_the_order_of_the_special_tokens(small_files: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer(small_files[0], num_special_tokens=128)
    assert tokenizer.vocab_size == 1200 + 128
    assert tokenizer.special("<|begin_of_text|>") == 1200
    assert tokenizer.special("<|patch|>") == 1200 + 92
    assert special_token_names(3) == ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>"]


LONG_RUNS = {
    "one letter": "a" * 1_000_000,
    "random letters": "".join(random.Random(0).choices(string.ascii_letters, k=1_000_000)),
    "line breaks": "\n" * 1_000_000,
    "han": "字" * 400_000,
}


@pytest.mark.parametrize("name", LONG_RUNS)
def test_a_megabyte_without_white_space_is_fast_and_whole(name: str, genuine: Tokenizer) -> None:
    text = LONG_RUNS[name]
    start = time.process_time()
    ids = genuine.encode(text)
    assert time.process_time() - start < 20  # 0.1 to 0.5 s on an idle core; quadratic merging would take hours
    assert genuine.decode(ids) == text


def test_a_long_run_of_one_letter_is_one_piece(genuine: Tokenizer) -> None:
    """Meta's code cuts runs at 25,000 characters, which leaves a seam; the whole run in one piece has none."""
    widest = max((token for token in genuine.ranks if set(token) == {ord("a")}), key=len)
    ids = genuine.encode("a" * (len(widest) * 5000))
    assert ids == [genuine.ranks[widest]] * 5000


@pytest.mark.parametrize("tail", ["", "x", " \n", ".", "\n  x", "\u3000\t7"])
@pytest.mark.parametrize("head", ["", "x", "x.", "x\n", ".\n\n"])
def test_long_white_space_is_cut_as_the_pattern_cuts_it(head: str, tail: str, genuine: Tokenizer) -> None:
    """tiktoken's engine still manages 150,000 blanks, so it can be asked; at a million it gives up."""
    text = head + " \t\u3000" * 50_000 + tail
    assert isinstance(genuine.model, RankedBytes)
    assert genuine.encode(text) == genuine.model._encoding.encode_ordinary(text)


def test_a_million_blanks(genuine: Tokenizer) -> None:
    for text in ("x" + " " * 1_500_000 + "y", " " * 1_500_000 + "\n", "\t" * 1_500_000):
        assert genuine.decode(genuine.encode(text)) == text


def test_ten_megabytes_of_text(genuine: Tokenizer, reference: meta.Tokenizer) -> None:
    paragraph = "It was a bright cold day in April, and 13 clocks were striking.\n\nÜber 日本 \t " * 100
    text = paragraph * (10_000_000 // len(paragraph.encode()))
    start = time.process_time()
    ids = genuine.encode(text)
    assert time.process_time() - start < 30  # about 1 s on an idle core
    once = reference.encode(paragraph + paragraph, bos=False, eos=False)
    assert ids[: len(once) // 2] == once[: len(once) // 2]
    assert genuine.decode(ids) == text


def test_decode_bytes_splits_characters(genuine: Tokenizer) -> None:
    ids = genuine.encode("🏳️‍🌈𓀀")
    assert len(ids) > 2
    assert b"".join(genuine.decode_bytes([i]) for i in ids).decode() == "🏳️‍🌈𓀀"
    assert "\ufffd" in genuine.decode(ids[:1])
    assert genuine.decode([genuine.special("<|eot|>")]) == "<|eot|>"


@pytest.mark.parametrize("wrong", [202048, -1, 1 << 40])
def test_unknown_ids_are_named(wrong: int, genuine: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"{wrong} is not the id"):
        genuine.decode([5, wrong])


def test_lone_surrogates_are_refused(genuine: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"character 2 of the text is '\\ud83d'.*surrogate"):
        genuine.encode("ab\ud83d")
    with pytest.raises(TypeError, match="bytes"):
        genuine.encode(b"x")  # type: ignore[arg-type]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or tokenizer\.model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no tokens"),
        (b"not base64!\n", "line 1"),
        (b"IQ== 0\nIg== x\n", "line 2"),
        (b"IQ== 0\nIg== 5\n", "ranks"),
        (b"IQ== 0\nIg== 1\n", "254 of the 256 bytes"),
        (b"\x80\x04\x95 1", "line 1"),
    ],
)
def test_broken_model_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path / "tokenizer.model")


def test_other_json_tokenizers_are_refused(small_files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    good = json.loads(small_files[1].read_text("utf-8"))

    def refuses(data: object, message: str) -> None:
        path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
        with pytest.raises(ValueError, match=message):
            Tokenizer(path)

    refuses("{", "not a Hugging Face tokenizer.json")
    refuses([], "not a Hugging Face tokenizer.json")
    refuses({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "not a Hugging Face|Unigram")
    refuses(good | {"model": good["model"] | {"type": "WordPiece"}}, "holds a WordPiece tokenizer; Llama's are BPE")
    refuses(good | {"pre_tokenizer": None, "decoder": None}, "neither bytes nor SentencePiece's pieces")
    refuses(good | {"normalizer": {"type": "Lowercase"}}, "normalises")
    split, byte_level = good["pre_tokenizer"]["pretokenizers"]
    for pretokenizers, message in (
        ([split | {"invert": True}, byte_level], "'invert': True"),
        ([split, byte_level | {"add_prefix_space": True}], "'add_prefix_space': True"),
        ([split, {"type": "Whitespace"}, byte_level], "Whitespace"),
    ):
        refuses(good | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers}}, message)
    refuses(good | {"model": good["model"] | {"dropout": 0.1}}, r"dropout 0\.1")


def test_a_tokenizer_without_llamas_special_tokens_says_so(small_files: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer(small_files[0], num_special_tokens=2)
    with pytest.raises(ValueError, match=r"no special token '<\|eot\|>'"):
        tokenizer.special("<|eot|>")
    with pytest.raises(ValueError, match="num_special_tokens is -1"):
        Tokenizer(small_files[0], num_special_tokens=-1)
