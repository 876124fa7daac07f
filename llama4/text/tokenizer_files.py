"""The two files a byte-level BPE tokenizer is published in: tiktoken's tokenizer.model, Hugging Face's tokenizer.json.

In both, the rank of a token, which is its id, is also its priority when bytes are merged.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama4.errors import Llama4Error
from llama4.reading import MAX_INT, MAX_TOKENIZER_BYTES, read_bytes
from llama4.reading import read_json as read_file
from llama4.text.added_tokens import AddedToken
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
    return ranks


def read_json(
    path: Path, config: TokenizerConfig, controls: Collection[str]
) -> tuple[dict[bytes, int], list[AddedToken], str]:
    """Read Hugging Face's format -> ranks of the tokens, added tokens, and the pattern.

    An added token that is text is one of the ranks, too, if bytes merge into it; a special one never is, so that no
    text becomes it.

    Raises:
        Llama4Error: another format, or a tokenizer that is not a byte-level BPE with a pattern of its own.
    """
    try:
        data = read_file(path, MAX_TOKENIZER_BYTES)
        model: dict[str, Any] = data["model"]
        listed = [read_added_token(token, path) for token in data.get("added_tokens") or []]
        vocabulary: dict[str, int] = model["vocab"]
        kind = model.get("type", "BPE")
        merges = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
        ids = list(vocabulary.values())
        if not all(type(i) is int and 0 <= i <= MAX_INT for i in ids) or len(set(ids)) < len(ids):
            raise TypeError("ids are whole numbers, each once")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Llama4Error(
            f"{path} is not a Hugging Face tokenizer.json ({error!r}); fetch the tokenizer again"
        ) from None
    if kind != "BPE" or not _mentions(data, "ByteLevel") or model.get("byte_fallback"):
        raise Llama4Error(
            f"{path} holds a {kind} tokenizer that is not a byte-level BPE; Llama 4's is one: use the tokenizer that "
            "belongs to the model"
        )
    if data.get("normalizer"):
        raise Llama4Error(f"{path} normalises text before it encodes it, which Llama 4's tokenizer does not")
    added = [
        replace(token, id=vocabulary.get(token.content, token.id))
        for token in config.apply(listed, controls)
        if token.content
    ]
    _check_ids(added, vocabulary, path)
    merged_tokens = set(merges)
    beside = {
        token.content
        for token in added
        if token.special or not (len(token.content) == 1 or token.content in merged_tokens)
    }
    ranks = _ranks({token: rank for token, rank in vocabulary.items() if token not in beside}, path)
    merged = [vocabulary.get(token, -1) for token in merges]
    if merged != sorted(merged):
        raise Llama4Error(f"{path} merges in another order than its ids, which tiktoken's ranks cannot express")
    pattern = _split_pattern(data.get("pre_tokenizer"))
    if pattern is None:
        raise Llama4Error(f"{path} does not cut text by a regular expression of its own, as Llama 4's tokenizer does")
    if odd := _odd_settings(data):
        raise Llama4Error(
            f"{path} has {odd}, which Llama 4's tokenizer has not; use the tokenizer that belongs to the model"
        )
    return ranks, added, pattern


def _ranks(vocabulary: Mapping[str, int], path: Path) -> dict[bytes, int]:
    """Raises:
    Llama4Error: a token that is not written in the byte-level alphabet.
    """
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    try:
        return {bytes(byte_of[character] for character in token): int(rank) for token, rank in vocabulary.items()}
    except KeyError as error:
        raise Llama4Error(f"{path}: {error} is no byte of the byte-level alphabet; is this Llama 4's file?") from None


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


def _odd_settings(data: Mapping[str, Any]) -> str | None:
    """What a byte-level BPE behind one regular expression does not do: further cuts, blanks put first, chance."""
    model, node = data["model"], data["pre_tokenizer"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"{name} {model[name]!r}"
    nodes = node.get("pretokenizers", [node])
    if (kinds := [each.get("type") for each in nodes]) != ["Split", "ByteLevel"]:
        return f"the pre-tokenizers {kinds}, not Split and ByteLevel alone"
    split, byte_level = nodes
    if (split.get("behavior"), split.get("invert")) not in (("Isolated", False), ("Removed", True)):
        return f"a Split with behavior {split.get('behavior')!r} and invert {split.get('invert')!r}"
    wrong = {"add_prefix_space", "use_regex"} - {name for name, value in byte_level.items() if value is False}
    return f"a ByteLevel with {' and '.join(sorted(wrong))}" if wrong else None


def _mentions(data: dict[str, Any], kind: str) -> bool:
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
