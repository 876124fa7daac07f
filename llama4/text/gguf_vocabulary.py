"""The vocabulary in a GGUF file. Source: llama.cpp's src/llama-vocab.cpp, also for how each `pre` splits text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llama4.errors import Llama4Error
from llama4.gguf import GgufFile, Keys
from llama4.text.added_tokens import AddedToken
from llama4.text.byte_level import GPT2, MergedBytes, RankedBytes, Splitter
from llama4.text.sentencepiece import Kind, Normalizer, Piece, SentencePiece
from llama4.text.tokenizer_config import TokenizerConfig
from llama4.text.tokenizer_files import TokenModel, byte_alphabet, to_json
from llama4.text.vocabulary import LLAMA3, LLAMA4, TEKKEN

GGUF_SUFFIX = ".gguf"
_KEY = "tokenizer.ggml"

_BY_IDS: Mapping[str, str] = {
    **dict.fromkeys(("llama4", "gpt-4o", "kanana2"), LLAMA4.pattern),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), LLAMA3.pattern),
    "tekken": TEKKEN,
}
"""`pre` of vocabularies whose ids say what is merged first, as tiktoken's do -> the pattern that splits a text."""
_BY_MERGES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("dbrx", "smaug-bpe"), (LLAMA3.pattern,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (LLAMA3.pattern.replace(r"\p{N}{1,3}", r"\p{N}"),)),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), (r"\p{N}", GPT2)),
}
"""`pre` of the others -> patterns, each of which cuts what the one before has left."""

_BY_TOKEN = {"<|start_header_id|>": "llama-bpe", "<|header_start|>": "llama4"}
"""A token that only one generation has -> its `pre`, where that is missing."""

_ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token", "eot": "eot_token"}


def read_gguf(path: Path, controls: Collection[str]) -> tuple[TokenModel, list[AddedToken], bool, TokenizerConfig]:
    """What merges tokens, added tokens, whether a text to be continued begins with BOS, and which tokens have a role.

    Args:
        controls: names of the family's special tokens.

    Raises:
        FileNotFoundError: there is no vocabulary.
        Llama4Error: it is of another kind, or damaged.
    """
    keys = GgufFile.read(path).keys(_KEY)
    kind = keys.text("model", "")
    if not kind:
        raise FileNotFoundError(f"{path} has no {_KEY}.model, and so no vocabulary; give a file that has one")
    if kind not in ("gpt2", "llama"):
        raise Llama4Error(f"{path} has a vocabulary of kind {kind!r:.80}; 'gpt2' and 'llama' are read")
    tokens, kinds = read_tokens(keys)
    names = {role: tokens[i] for key, role in _ROLES.items() if (i := _id(keys, key, tokens)) is not None}
    config = TokenizerConfig(names)
    adds_bos = keys.flag("add_bos_token", kind == "llama" or _pre(keys) in _BY_IDS)
    if kind == "llama":
        model = _pieces(keys, tokens, kinds)
        return model, config.apply(model.controls(), ()), adds_bos, config
    special = (Kind.UNKNOWN, Kind.CONTROL, Kind.UNUSED)
    added = [
        AddedToken(i, token, special=type_ in special, normalized=type_ not in special)
        for i, (token, type_) in enumerate(zip(tokens, kinds, strict=True))
        if token and (type_ in (*special, Kind.USER_DEFINED) or token in controls)
    ]
    beside = {token.id for token in added}
    ranks = _ranks({i: token for i, token in enumerate(tokens) if token and i not in beside}, path)
    return _bytes(keys, ranks), config.apply(added, controls), adds_bos, config


def _bytes(keys: Keys, ranks: Mapping[bytes, int]) -> RankedBytes | MergedBytes:
    pre = _pre(keys)
    if pre in _BY_IDS and all(byte in ranks for byte in map(int.to_bytes, range(256))):
        return RankedBytes(Path(keys.place).name, ranks, _BY_IDS[pre])
    merges = _merges(keys)
    order = {pair: i for i, pair in reversed(list(enumerate(merges)))}
    return MergedBytes(ranks, order, [Splitter(each) for each in _patterns(pre)], byte_alphabet(), whole=pre in _BY_IDS)


def _patterns(pre: str) -> tuple[str, ...]:
    return _BY_MERGES.get(pre) or (_BY_IDS[pre],)


def _name_of(model: TokenModel) -> str | None:
    """The `pre` of what splits text so; None if there is none."""
    if isinstance(model, RankedBytes):
        return next((pre for pre, pattern in _BY_IDS.items() if pattern == model.pattern), None)
    if not isinstance(model, MergedBytes) or model.normal_form or any(each.only_matches for each in model.splitters):
        return None
    patterns = tuple(each.pattern for each in model.splitters)
    return next((pre for pre in (_BY_IDS if model.whole else _BY_MERGES) if _patterns(pre) == patterns), None)


def _merges(keys: Keys) -> list[tuple[str, str]]:
    found = keys.texts("merges")
    if not found or any(text.count(" ") != 1 for text in found):
        raise Llama4Error(f"{keys.place} has no {_KEY}.merges of two tokens each; fetch it again")
    return [(left, right) for left, _, right in (text.partition(" ") for text in found)]


def _pieces(keys: Keys, tokens: Sequence[str], kinds: Sequence[Kind]) -> SentencePiece:
    scores = keys.metadata.get(f"{_KEY}.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise Llama4Error(f"{keys.place} has {len(tokens)} tokens and not as many {_KEY}.scores; fetch it again")
    normalizer = Normalizer(
        adds_blank=keys.flag("add_space_prefix", True), removes_blanks=keys.flag("remove_extra_whitespaces", False)
    )
    return SentencePiece([Piece(*each) for each in zip(tokens, scores.tolist(), kinds, strict=True)], normalizer)


def _pre(keys: Keys) -> str:
    """How text is split; where the file, of an old converter, does not say it, as its vocabulary is.

    Raises:
        Llama4Error: in a way that is not known.
    """
    pre = keys.text("pre", "default")
    if pre == "default":
        tokens = {*keys.texts("tokens")}
        pre = next((name for token, name in _BY_TOKEN.items() if token in tokens), pre)
    if pre == "default":
        raise Llama4Error(
            f"{keys.place} does not say how text is split ({_KEY}.pre), as an old converter wrote it; fetch a newer "
            "file, or convert the model again"
        )
    if pre not in _BY_IDS and pre not in _BY_MERGES:
        known = ", ".join((*_BY_IDS, *_BY_MERGES))
        raise Llama4Error(f"{keys.place} splits text as {pre!r:.80} does, which is not known; known are {known}")
    return pre


def _ranks(tokens: Mapping[int, str], path: Path) -> dict[bytes, int]:
    """Bytes of a token -> id, where it is written in the alphabet of bytes."""
    alphabet = {character: byte for byte, character in byte_alphabet().items()}
    ranks: dict[bytes, int] = {}
    for i, token in tokens.items():
        try:
            first = ranks.setdefault(bytes(alphabet[character] for character in token), i)
        except KeyError as error:
            raise Llama4Error(f"{path}: token {i}, {token!r:.80}, has {error}, which is no byte's character") from None
        if first != i:
            raise Llama4Error(f"{path} has the token {token!r:.80} twice, as {first} and {i}; fetch it again")
    return ranks


def read_tokens(keys: Keys) -> tuple[list[str], list[Kind]]:
    """The texts and the kinds of all tokens.

    Raises:
        Llama4Error: there are none, or not for each a kind.
    """
    tokens, kinds = keys.texts("tokens"), keys.metadata.get(f"{_KEY}.token_type")
    if not tokens:
        raise Llama4Error(f"{keys.place} has no {_KEY}.tokens, and so no vocabulary; fetch it again")
    if kinds is None:
        return tokens, [_kind_of(token) for token in tokens]
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens) or not {*kinds.tolist()} <= {*Kind}:
        raise Llama4Error(f"{keys.place} has {len(tokens)} tokens, and not for each a type from 1 to 6; fetch it again")
    return tokens, [Kind(kind) for kind in kinds.tolist()]


def _kind_of(token: str) -> Kind:
    """That of a token in a file without types, by its text: Llama's vocabularies name them alike."""
    if token == "<unk>":
        return Kind.UNKNOWN
    if token in ("<s>", "</s>") or re.fullmatch(r"<\|\w+\|>", token):
        return Kind.CONTROL
    return Kind.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else Kind.NORMAL


def _id(keys: Keys, role: str, tokens: Sequence[str]) -> int | None:
    found = keys.token(f"{role}_token_id")
    if found is not None and found >= len(tokens):
        raise Llama4Error(f"{keys.place}: {_KEY}.{role}_token_id is {found}, and there are {len(tokens)} tokens")
    return found


def tokenizer_json(path: Path, model: TokenModel, added: Sequence[AddedToken]) -> dict[str, Any]:
    """The content of a tokenizer.json that encodes texts as a file's vocabulary of bytes does."""
    keys = GgufFile.read(path).keys(_KEY)
    pre, tokens = _pre(keys), keys.texts("tokens")
    bos = _id(keys, "bos", tokens)
    name = tokens[bos] if bos is not None and keys.flag("add_bos_token", pre in _BY_IDS) else ""
    if isinstance(model, RankedBytes):
        return to_json(model.ranks, added, model.pattern, name)
    content = to_json({}, added, "", name)
    alphabet = byte_alphabet()
    vocabulary = {"".join(alphabet[byte] for byte in token): i for token, i in model.ranks.items()}
    content["model"] |= {"vocab": vocabulary, "merges": keys.texts("merges"), "ignore_merges": pre in _BY_IDS}
    byte_level = content["pre_tokenizer"]["pretokenizers"][-1]
    splits = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in _patterns(pre)
    ]
    content["pre_tokenizer"]["pretokenizers"] = [*splits, byte_level]
    content["added_tokens"] = [asdict(token) for token in added]
    return content


def vocabulary_metadata(
    path: Path,
    model: TokenModel,
    added: Sequence[AddedToken],
    roles: Mapping[str, int | None],
    size: int,
    *,
    adds_bos: bool = True,
) -> dict[str, Any]:
    """The keys of a tokenizer.

    Args:
        path: the file that it was read from. If that is GGUF, its keys stay.
        roles: "bos", "eos" and "padding" -> id.
        size: rows of the model's embedding; ids beyond the tokenizer's are unused tokens.
        adds_bos: whether a text to be continued begins with BOS.

    Raises:
        Llama4Error: it splits text in a way that GGUF has no name for.
    """
    if path.suffix.lower() == GGUF_SUFFIX:
        return {key: value for key, value in GgufFile.read(path).metadata.items() if key.startswith("tokenizer.")}
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [Kind.UNUSED] * size
    keys: dict[str, Any] = {f"{role}_token_id": i for role, i in roles.items() if i is not None}
    if isinstance(model, SentencePiece):
        scores = [-1000.0] * size
        for i, piece in enumerate(model.pieces):
            tokens[i], kinds[i], scores[i] = piece.text, piece.kind, piece.score
        blank = model.normalizer.adds_blank
        keys |= {"model": "llama", "pre": "default", "scores": np.array(scores, np.float32), "add_space_prefix": blank}
    else:
        if (pre := _name_of(model)) is None:
            raise Llama4Error(f"{path} splits text in a way that GGUF has no name for; keep the model's layout")
        alphabet = byte_alphabet()
        for content, i in model.ranks.items():
            tokens[i], kinds[i] = "".join(alphabet[byte] for byte in content), Kind.NORMAL
        merges = (
            sorted(model.merges, key=model.merges.__getitem__)
            if isinstance(model, MergedBytes)
            else to_json(model.ranks, (), model.pattern)["model"]["merges"]
        )
        keys |= {"model": "gpt2", "pre": pre, "merges": [f"{left} {right}" for left, right in merges]}
    for token in added:
        tokens[token.id], kinds[token.id] = token.content, Kind.CONTROL if token.special else Kind.USER_DEFINED
    keys |= {"tokens": tokens, "token_type": np.array(kinds, np.int32), "add_bos_token": adds_bos}
    return {f"{_KEY}.{key}": value for key, value in keys.items()}
