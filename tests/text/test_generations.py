"""Tokenizers of all generations of Llama, against those who made them: Meta's code, sentencepiece, `tokenizers`."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from llama4.errors import Llama4Error
from llama4.text.byte_level import MergedBytes, RankedBytes
from llama4.text.gguf_vocabulary import vocabulary_metadata
from llama4.text.sentencepiece import SentencePiece
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import INFILLING, LLAMA3, LLAMA4, SENTENCEPIECE
from tests import small_model
from tests.weights import gguf_files

DOCS = Path(__file__).parents[2] / "docs"
CORPUS = [
    line
    for name in ("fidelity.md", "architecture.md")
    for line in (DOCS / name).read_text("utf-8").splitlines()
    if line
]
CORPUS += ["Grüße aus Zürich, wo 日本語 vorkommt", "你好，世界。这是一个测试", "naïve café “quotes” … ½ ﬁne"] * 5
PARTS = [
    *(
        "the",
        "and ",
        "camelCase",
        "HTTPServer",
        "don't",
        "WE'LL",
        "a",
        "b",
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
    ),
    *(
        "Zürich",
        "日",
        "本",
        "🦙",
        "\u2581",
        "<s>",
        "</s>",
        "<0x0A>",
        "<unk>",
        "ﬁ",
        "½",
        "１",
        "e\u0301",
        "...",
        "1234567",
    ),
    *("\u00a0", "\u3000", "<|eot_id|>", "<|begin_of_text|>", "<X>", "/", "foo/bar", "==", "\0", "\x7f", "ß", "İ"),
]


def texts(count: int = 400) -> list[str]:
    draw = random.Random(0)
    return [*CORPUS[::7], *("".join(draw.choices(PARTS, k=draw.randint(0, 25))) for _ in range(count))]


# -- Llama 3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meta() -> MetaTokenizer:
    return MetaTokenizer.get_instance()


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    from llama_models import llama3

    return Tokenizer(Path(next(iter(llama3.__path__))) / "tokenizer.model")


def test_llama3_has_its_own_split_and_names(meta: MetaTokenizer, llama3: Tokenizer) -> None:
    assert llama3.vocabulary is LLAMA3
    assert [llama3.encode(text) for text in texts()] == [meta.encode(text, bos=False, eos=False) for text in texts()]
    assert llama3.special_tokens == meta.special_tokens
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (meta.bos_id, meta.eot_id, meta.pad_id)
    assert set(llama3.stop_ids) == set(meta.stop_tokens)
    assert llama3.vocab_size == meta.n_words


def test_llama3_as_tokenizer_json(tmp_path: Path) -> None:
    """What we write reads back as the same, with its own generation's names, whatever the family's are."""
    small = Tokenizer(small_model.write_tokenizer(tmp_path / "tokenizer.model"), vocabulary=LLAMA3)
    small.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    back = Tokenizer(tmp_path, vocabulary=LLAMA4)
    assert isinstance(back.model, RankedBytes)
    assert [back.encode(text) for text in texts(100)] == [small.encode(text) for text in texts(100)]
    assert (back.eos_id, back.pad_id, back.adds_bos) == (small.eos_id, small.pad_id, True)


# -- SentencePiece -----------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "whole": {"user_defined_symbols": ["<X>", "ab  c", "the"]},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no-blank": {"add_dummy_prefix": False},
    "no-bytes": {"byte_fallback": False},
    "across": {"split_by_whitespace": False},
}


def train(path: Path, **options: Any) -> Any:
    """A model of sentencepiece, of the extra `test`, and its processor."""
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    usual = {"vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    usual |= {"remove_extra_whitespaces": False, "character_coverage": 0.99, "allow_whitespace_only_pieces": True}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, minloglevel=2, **(usual | options)
    )
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    theirs, ours = train(tmp_path / "tokenizer.model", **MODELS[name]), Tokenizer(tmp_path / "tokenizer.model")
    assert ours.vocabulary is SENTENCEPIECE
    for text in [*texts(), "a" * 3000, " " * 3000, "\n".join(CORPUS)]:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id(), theirs.eos_id(), theirs.vocab_size())
    if name in ("llama", "whole"):
        assert all(ours.decode(ours.encode(text)) == " " + text.replace("\u2581", " ") for text in texts(50) if text)


def test_infilling_tokens_are_no_text(tmp_path: Path) -> None:
    """In Code Llama's file they are ordinary pieces, which a text with their names would become."""
    theirs = train(tmp_path / "tokenizer.model", user_defined_symbols=list(INFILLING))
    ours = Tokenizer(tmp_path / "tokenizer.model")
    assert [ours.special(name) for name in INFILLING] == [theirs.piece_to_id(name) for name in INFILLING]
    assert theirs.piece_to_id(INFILLING.prefix) in theirs.encode("a <PRE> b")
    assert ours.special(INFILLING.prefix) not in ours.encode("a <PRE> b")
    assert ours.decode(ours.encode("a <PRE> b")) == " a <PRE> b"


def test_other_models_of_sentencepiece_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    train(path, model_type="unigram")
    with pytest.raises(Llama4Error, match="is a unigram model; Llama's are BPE"):
        Tokenizer(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Llama4Error, match="is no model of sentencepiece"):
        Tokenizer(path)


# -- tokenizer.json ----------------------------------------------------------------------------------------------------

SPLITS: dict[str, Sequence[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "nfc": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-3": [
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@pytest.mark.parametrize(
    ("name", "whole", "pre"),
    [
        *(("gpt-2", False, "gpt-2"), ("gpt-2", True, None), ("nfc", False, None)),
        *(("smollm", False, "smollm"), ("smollm", True, None)),
        *(("llama-3", False, "dbrx"), ("llama-3", True, "llama-bpe")),
    ],
)
def test_byte_level_bpe_of_others(name: str, whole: bool, pre: str | None, tmp_path: Path) -> None:
    """Some bytes have no token: they are left out. What GGUF has a name for is written there, and encodes alike."""
    theirs = tokenizers.Tokenizer(BPE(ignore_merges=whole))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Sequence(list(SPLITS[name])), decoders.ByteLevel()
    theirs.normalizer = normalizers.NFC() if name == "nfc" else None
    theirs.train_from_iterator(CORPUS, BpeTrainer(vocab_size=600, special_tokens=["<|im_start|>", "<|im_end|>"]))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    for text in texts():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert not ours.adds_bos
    assert isinstance(ours.model, MergedBytes) or whole
    vocabulary = ours.path, ours.model, ours.added_tokens, {"eos": 1}, ours.vocab_size
    if pre is None:
        with pytest.raises(Llama4Error, match="splits text in a way that GGUF has no name for"):
            vocabulary_metadata(*vocabulary)
        return
    metadata = vocabulary_metadata(*vocabulary, adds_bos=False)
    assert metadata["tokenizer.ggml.pre"] == pre
    gguf_files.write(tmp_path / "a.gguf", metadata, {})
    written = Tokenizer(tmp_path / "a.gguf")
    for text in texts():
        assert written.encode(text) == ours.encode(text), text
    assert (written.special_tokens, written.adds_bos) == (ours.special_tokens, False)


@pytest.mark.parametrize("form", ["prepend", "metaspace"])
def test_sentencepiece_as_tokenizer_json(form: str, tmp_path: Path) -> None:
    """Llama 1 and 2 in Hugging Face's files, in their older and their newer form. The latter puts no blank before a
    text that begins with one; sentencepiece and the older form do."""
    model = BPE(fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    theirs = tokenizers.Tokenizer(model)
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    theirs.normalizer = normalizers.Sequence(blanks) if form == "prepend" else None
    if form == "metaspace":
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    short = [line[:60] for line in CORPUS]
    theirs.train_from_iterator(short, BpeTrainer(vocab_size=600, special_tokens=names, limit_alphabet=60))
    content = json.loads(theirs.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.post_processor = begin
    theirs.encode_special_tokens = True
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    assert isinstance(ours.model, SentencePiece)
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 2, True)
    for text in texts():
        is_other = any(f"<{name}>" in text for name in ("unk", "s", "/s")) or text.startswith((" ", "\u2581"))
        if not is_other or (form == "prepend" and text.startswith(" ") and "<" not in text):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
