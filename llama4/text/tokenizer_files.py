"""The files a tokenizer is published in: tokenizer.model, which is tiktoken's or SentencePiece's, and Hugging Face's
tokenizer.json."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from llama4.errors import Llama4Error
from llama4.reading import MAX_INT, MAX_TOKENIZER_BYTES, read_bytes
from llama4.reading import read_json as read_file
from llama4.text.added_tokens import AddedToken
from llama4.text.byte_level import GPT2, MergedBytes, NormalForm, RankedBytes, Splitter
from llama4.text.sentencepiece import BLANK, Kind, Normalizer, Piece, SentencePiece
from llama4.text.tokenizer_config import TokenizerConfig, read_added_token


def find_file(path: Path) -> Path:
    """The tokenizer's file, if `path` is it or the directory that it is in.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"no tokenizer.json or tokenizer.model in {path}; copy the model's there")
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; give a tokenizer.model, a tokenizer.json or their directory")
    return path


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Read tiktoken's format: on each line a token in base64 and its rank.

    Raises:
        Llama4Error: another format, or ranks that are not 0, 1, 2, ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, MAX_TOKENIZER_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise Llama4Error(
                f"line {number} of {path} is {line[:40]!r}, not a token in base64 and its rank; is it tiktoken's "
                "tokenizer.model, whole?"
            ) from None
    if not ranks:
        raise Llama4Error(f"{path} holds no tokens; fetch the tokenizer again")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise Llama4Error(f"the ranks in {path} are not 0 to {len(ranks) - 1}, each once; fetch the tokenizer again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise Llama4Error(
            f"{path} has no token for {len(missing)} of the 256 bytes (the first: {missing[0]:#04x}), which tiktoken's "
            "files have; fetch the tokenizer again"
        )
    return ranks


class TokenModel(Protocol):
    """What merges the characters or bytes of a text into tokens."""

    @property
    def ranks(self) -> Mapping[bytes, int]:
        """Token, as the file writes it -> id."""

    @property
    def pattern(self) -> str:
        """The regular expression by which a text is split first, where there is one."""

    @property
    def longest(self) -> int | None:
        """Most bytes of a text, in UTF-8, that become one token; None where some may become none."""

    def encode(self, text: str, *, blank: bool = True, most: float = math.inf) -> list[int]:
        """A text without added tokens -> ids.

        Args:
            blank: whether a blank is put before it, if this vocabulary does so at all.
            most: soon after so many ids the rest of the text is left.
        """

    def token_bytes(self, i: int) -> bytes:
        """Raises:
        LookupError: there is no such token.
        """


def read_json(
    path: Path, config: TokenizerConfig, controls: Collection[str]
) -> tuple[TokenModel, list[AddedToken], bool]:
    """Read Hugging Face's format -> the model, added tokens, and whether a text begins with a prompt's first token.

    An added token that is text is one of the model's, too, if bytes merge into it; a special one never is, so that no
    text becomes it.

    Raises:
        Llama4Error: another format, or a tokenizer that is no BPE.
    """
    try:
        data = read_file(path, MAX_TOKENIZER_BYTES)
        model: dict[str, Any] = data["model"]
        listed = [read_added_token(token, path) for token in data.get("added_tokens") or []]
        vocabulary: dict[str, int] = model["vocab"]
        kind = model.get("type", "BPE")
        merges = [_pair(merge) for merge in model["merges"]] if kind == "BPE" else []
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        if not all(type(i) is int and 0 <= i <= MAX_INT for i in ids) or len(set(ids)) < len(ids):
            raise TypeError("ids are whole numbers, each once")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Llama4Error(
            f"{path} is not a Hugging Face tokenizer.json ({error!r}); fetch the tokenizer again"
        ) from None
    if kind != "BPE":
        raise Llama4Error(f"{path} holds a {kind} tokenizer; Llama's are BPE: use the tokenizer of the model")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise Llama4Error(f"{path} has {name} {model[name]!r}, which no Llama has; use the tokenizer of the model")
    added = [
        replace(token, id=vocabulary.get(token.content, token.id))
        for token in config.apply(listed, controls)
        if token.content
    ]
    _check_ids(added, vocabulary, path)
    try:
        read = _read_pieces if model.get("byte_fallback") else _read_bytes
        made = read(data, vocabulary, merges, added, path)
    except (TypeError, AttributeError, KeyError) as error:
        raise Llama4Error(f"{path} is not a Hugging Face tokenizer.json ({error!r}); fetch it again") from None
    return made, added, _begins(data.get("post_processor"))


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(left, str) and isinstance(right, str)):
        raise TypeError("merges are pairs of texts")
    return left, right


def _begins(node: Any) -> bool:
    """Whether a post-processor puts a token before a text."""
    if not isinstance(node, dict):
        return False
    single = node.get("single") if node.get("type") == "TemplateProcessing" else None
    if isinstance(single, list) and single and isinstance(single[0], dict) and "SpecialToken" in single[0]:
        return True
    return any(_begins(child) for child in _nodes(node, "processors"))


def _read_bytes(
    data: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[AddedToken],
    path: Path,
) -> TokenModel:
    """A byte-level BPE."""
    if not _mentions(data, "ByteLevel"):
        raise Llama4Error(f"{path} holds a BPE over neither bytes nor SentencePiece's pieces; use the model's own")
    merged_tokens = {left + right for left, right in merges}
    beside = {
        token.content
        for token in added
        if token.special or not (len(token.content) == 1 or token.content in merged_tokens)
    }
    ranks = _ranks({token: rank for token, rank in vocabulary.items() if token not in beside}, path)
    normal_form = _normal_form(data.get("normalizer"), path)
    pattern, splitters = _split_pattern(data["pre_tokenizer"]), _splitters(data["pre_tokenizer"], path)
    whole = bool(data["model"].get("ignore_merges"))
    merged = [vocabulary.get(left + right, -1) for left, right in merges]
    follow_from_ids = whole and merged == sorted(merged) and -1 not in merged
    is_complete = all(bytes([byte]) in ranks for byte in range(256))
    if pattern is not None and len(splitters) == 1 and follow_from_ids and is_complete and normal_form is None:
        return RankedBytes(path.name, ranks, pattern, splitters[0])
    order = {pair: i for i, pair in reversed(list(enumerate(merges))) if pair[0] + pair[1] in vocabulary}
    return MergedBytes(ranks, order, splitters, byte_alphabet(), whole=whole, normal_form=normal_form)


def _read_pieces(
    data: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[AddedToken],
    path: Path,
) -> TokenModel:
    """SentencePiece's BPE, as transformers converts it: blanks are U+2581, and what is no piece is bytes."""
    adds_blank = _adds_blank(data.get("normalizer"), data.get("pre_tokenizer"), path)
    unknown, special = data["model"].get("unk_token"), {token.content for token in added if token.special}
    pieces = [Piece("", kind=Kind.CONTROL)] * (1 + max(vocabulary.values(), default=0))
    for text, i in vocabulary.items():
        kind = Kind.UNKNOWN if text == unknown else Kind.CONTROL if text in special else Kind.NORMAL
        pieces[i] = Piece(text, kind=Kind.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else kind)
    order = {pair: i for i, pair in reversed(list(enumerate(merges)))}
    return SentencePiece(pieces, Normalizer(adds_blank), frozenset(special), order)


def _adds_blank(normalizer: Any, splitter: Any, path: Path) -> bool:
    """Whether a text begins with a blank that it does not have.

    Raises:
        Llama4Error: text becomes something else than with blanks for U+2581.
    """
    normalizers = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer]
    kinds = [(each or {}).get("type") for each in normalizers]
    if kinds == [None] and splitter is None:
        return False
    if kinds == [None] and splitter.get("type") == "Metaspace" and splitter.get("replacement") == BLANK:
        scheme = splitter.get("prepend_scheme", "always" if splitter.get("add_prefix_space", True) else "never")
        return bool(scheme != "never")
    if splitter is None and kinds in (["Prepend", "Replace"], ["Replace"]):
        *prepended, replaced = normalizers
        is_usual = (replaced["pattern"], replaced["content"]) == ({"String": " "}, BLANK)
        if is_usual and all(each["prepend"] == BLANK for each in prepended):
            return bool(prepended)
    raise Llama4Error(
        f"{path} prepares text with {', '.join(map(str, kinds))} in a way that is not read; take the tokenizer.model "
        "of the same model"
    )


def _normal_form(node: Any, path: Path) -> NormalForm | None:
    """Which of Unicode's normal forms a text is brought into before it is split.

    Raises:
        Llama4Error: something else is done to it.
    """
    if node is None:
        return None
    form = node.get("type") if isinstance(node, dict) else None
    if form == "NFC" or form == "NFD" or form == "NFKC" or form == "NFKD":
        return form
    raise Llama4Error(
        f"{path} normalises text by {str(node)[:80]}, which no Llama does; use the tokenizer of the model"
    )


def _splitters(node: Any, path: Path) -> list[Splitter]:
    """What cuts a text.

    Raises:
        Llama4Error: a pre-tokenizer that is not read.
        ValueError: a pattern that is none.
    """
    kind = node.get("type")
    if kind == "Sequence":
        return [splitter for child in node["pretokenizers"] for splitter in _splitters(child, path)]
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return [Splitter(GPT2)] if node.get("use_regex", True) else []
    if kind == "Digits":
        return [Splitter(r"\p{N}" if node.get("individual_digits") else r"\p{N}+")]
    if kind == "Split" and (node.get("behavior"), node.get("invert")) in (("Isolated", False), ("Removed", True)):
        pattern = node["pattern"]
        text = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
        return [Splitter(text, only_matches=node["behavior"] == "Removed")]
    settings = {name: value for name, value in node.items() if name != "pattern"}
    raise Llama4Error(f"{path} cuts text by {str(settings)[:200]}, which is not read; use the tokenizer of the model")


def _ranks(vocabulary: Mapping[str, int], path: Path) -> dict[bytes, int]:
    """Raises:
    Llama4Error: a token that is not written in the byte-level alphabet.
    """
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    try:
        return {bytes(byte_of[character] for character in token): int(rank) for token, rank in vocabulary.items()}
    except KeyError as error:
        raise Llama4Error(f"{path}: {error} is no byte of the byte-level alphabet; is this the model's file?") from None


def _check_ids(added: Sequence[AddedToken], vocabulary: Mapping[str, int], path: Path) -> None:
    """Raises:
    Llama4Error: two tokens with one id.
    """
    contents = {i: content for content, i in vocabulary.items()}
    for token in added:
        if contents.setdefault(token.id, token.content) != token.content:
            raise Llama4Error(
                f"{path} and the files beside it give the id {token.id} to both {contents[token.id]!r} and "
                f"{token.content!r}; fetch the tokenizer again"
            )


def _nodes(node: Mapping[str, Any], name: str) -> list[Any]:
    """What a sequence of pre-tokenizers or decoders consists of."""
    found = node.get(name)
    return found if isinstance(found, list) else []


def _split_pattern(node: Any) -> str | None:
    """The regular expression of the first `Split` in a pre-tokenizer, if there is one."""
    if not isinstance(node, dict):
        return None
    if node.get("type") == "Split" and isinstance(node.get("pattern"), dict):
        pattern = node["pattern"].get("Regex")
        return pattern if isinstance(pattern, str) else None
    found = (_split_pattern(child) for child in _nodes(node, "pretokenizers"))
    return next((pattern for pattern in found if pattern), None)


def _mentions(data: Mapping[str, Any], kind: str) -> bool:
    """Whether the pre-tokenizer or the decoder is, or contains, one of this type."""
    nodes = [data.get("pre_tokenizer"), data.get("decoder")]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if node.get("type") == kind:
                return True
            nodes += [*_nodes(node, "pretokenizers"), *_nodes(node, "decoders")]
    return False


def byte_alphabet() -> dict[int, str]:
    """The printable characters that stand for the 256 bytes in a tokenizer.json: visible Latin-1 characters for
    themselves, the rest from U+0100 on, in order (GPT-2's `bytes_to_unicode`)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


def to_json(ranks: Mapping[bytes, int], added: Sequence[AddedToken], pattern: str, bos: str = "") -> dict[str, Any]:
    """The content of a Hugging Face tokenizer.json. Any two tokens whose bytes make up a third merge into it; `bos` is
    put before every text that is encoded with special tokens."""
    alphabet = byte_alphabet()
    vocabulary = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos_id = next((token.id for token in added if token.content == bos), None)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [asdict(token) for token in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _begin_with(bos, bos_id, byte_level) if bos_id is not None else None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _begin_with(bos: str, bos_id: int, byte_level: Mapping[str, Any]) -> dict[str, Any]:
    """The post-processor that Meta's tokenizer.json have: each text of a pair begins with `bos`."""
    texts = [
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    ]
    template = {
        "type": "TemplateProcessing",
        "single": texts[0],
        "pair": texts[0] + texts[1],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    return {"type": "Sequence", "processors": [byte_level, template]}
