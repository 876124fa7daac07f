"""The vocabulary in a GGUF file. Source: llama.cpp's src/llama-vocab.cpp, also for how each `pre` splits text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llama4.errors import Llama4Error
from llama4.gguf import GgufFile, Keys
from llama4.text.added_tokens import AddedToken
from llama4.text.byte_level import GPT2, MergedBytes, RankedBytes, by_pattern
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

_ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token", "eot": "eot_token"}


def read_gguf(path: Path, controls: Collection[str]) -> tuple[TokenModel, list[AddedToken], bool, TokenizerConfig]:
    """What merges tokens, added tokens, whether a text to be continued begins with BOS, and which tokens have a role.

    Args:
        controls: names of the family's special tokens.

    Raises:
        FileNotFoundError: there is no vocabulary.
        Llama4Error: it is of another kind, or damaged.
    """
    file = GgufFile.read(path)
    metadata, kind = file.metadata, file.keys(_KEY).text("model", "")
    if not kind:
        raise FileNotFoundError(f"{path} has no {_KEY}.model, and so no vocabulary; give a file that has one")
    if kind not in ("gpt2", "llama"):
        raise Llama4Error(f"{path} has a vocabulary of kind {kind!r:.80}; 'gpt2' and 'llama' are read")
    tokens, kinds = _tokens(metadata, path)
    names = {role: tokens[i] for key, role in _ROLES.items() if (i := _id(metadata, key, tokens, path)) is not None}
    config = TokenizerConfig(names)
    adds_bos = metadata.get(f"{_KEY}.add_bos_token", kind == "llama" or _pre(metadata, path) in _BY_IDS) is True
    if kind == "llama":
        model = _pieces(metadata, tokens, kinds, path)
        return model, config.apply(model.controls(), ()), adds_bos, config
    special = (Kind.UNKNOWN, Kind.CONTROL, Kind.UNUSED)
    added = [
        AddedToken(i, token, special=type_ in special, normalized=type_ not in special)
        for i, (token, type_) in enumerate(zip(tokens, kinds, strict=True))
        if token and (type_ in (*special, Kind.USER_DEFINED) or token in controls)
    ]
    beside = {token.id for token in added}
    ranks = _ranks({i: token for i, token in enumerate(tokens) if token and i not in beside}, path)
    return _bytes(metadata, ranks, path), config.apply(added, controls), adds_bos, config


def _bytes(metadata: Mapping[str, Any], ranks: Mapping[bytes, int], path: Path) -> RankedBytes | MergedBytes:
    pre = _pre(metadata, path)
    if pre in _BY_IDS and all(byte in ranks for byte in map(int.to_bytes, range(256))):
        return RankedBytes(path.name, ranks, _BY_IDS[pre])
    patterns = _BY_MERGES.get(pre) or (_BY_IDS[pre],)
    merges = _merges(metadata, path)
    order = {pair: i for i, pair in reversed(list(enumerate(merges)))}
    return MergedBytes(ranks, order, [by_pattern(each) for each in patterns], byte_alphabet(), whole=pre in _BY_IDS)


def _merges(metadata: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    found = metadata.get(f"{_KEY}.merges")
    if not isinstance(found, list) or any(text.count(" ") != 1 for text in found):
        raise Llama4Error(f"{path} has no {_KEY}.merges of two tokens each; fetch it again")
    return [(left, right) for left, _, right in (text.partition(" ") for text in found)]


def _pieces(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[Kind], path: Path) -> SentencePiece:
    scores = metadata.get(f"{_KEY}.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise Llama4Error(f"{path} has {len(tokens)} tokens and not as many {_KEY}.scores; fetch it again")
    normalizer = Normalizer(
        adds_blank=metadata.get(f"{_KEY}.add_space_prefix", True) is True,
        removes_blanks=metadata.get(f"{_KEY}.remove_extra_whitespaces", False) is True,
    )
    return SentencePiece([Piece(*each) for each in zip(tokens, scores.tolist(), kinds, strict=True)], normalizer)


def _pre(metadata: Mapping[str, Any], path: Path) -> str:
    """How text is split.

    Raises:
        Llama4Error: in a way that is not known.
    """
    pre = Keys(metadata, _KEY, str(path)).text("pre", "default")
    if pre not in _BY_IDS and pre not in _BY_MERGES:
        known = ", ".join((*_BY_IDS, *_BY_MERGES))
        raise Llama4Error(f"{path} splits text as {pre!r:.80} does, which is not known; known are {known}")
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


def _tokens(metadata: Mapping[str, Any], path: Path) -> tuple[list[str], list[Kind]]:
    """The texts and the kinds of all tokens."""
    tokens, kinds = metadata.get(f"{_KEY}.tokens"), metadata.get(f"{_KEY}.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise Llama4Error(f"{path} has no {_KEY}.tokens, and so no vocabulary; fetch it again")
    if kinds is None:
        return tokens, [Kind.NORMAL] * len(tokens)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens) or not {*kinds.tolist()} <= {*Kind}:
        raise Llama4Error(f"{path} has {len(tokens)} tokens, and not for each a type from 1 to 6; fetch it again")
    return tokens, [Kind(kind) for kind in kinds.tolist()]


def _id(metadata: Mapping[str, Any], key: str, tokens: Sequence[str], path: Path) -> int | None:
    found = metadata.get(f"{_KEY}.{key}_token_id")
    if found is None:
        return None
    if type(found) is not int or not 0 <= found < len(tokens):
        raise Llama4Error(f"{path}: {_KEY}.{key}_token_id is {found!r:.80}, and there are {len(tokens)} tokens")
    return found


def tokenizer_json(path: Path, model: TokenModel, added: Sequence[AddedToken]) -> dict[str, Any]:
    """The content of a tokenizer.json that encodes texts as a file's vocabulary does.

    Raises:
        Llama4Error: a vocabulary of sentencepiece.
    """
    metadata = GgufFile.read(path).metadata
    if isinstance(model, SentencePiece):
        raise Llama4Error(
            f"{path} has a vocabulary of sentencepiece, which is not written as a tokenizer.json; put the original "
            "model's tokenizer.model beside what you save, or keep GGUF"
        )
    bos = _id(metadata, "bos", metadata[f"{_KEY}.tokens"], path)
    adds_bos = bos is not None and metadata.get(f"{_KEY}.add_bos_token", _pre(metadata, path) in _BY_IDS) is True
    name = metadata[f"{_KEY}.tokens"][bos] if adds_bos else ""
    if isinstance(model, RankedBytes):
        return to_json(model.ranks, added, model.pattern, name)
    content = to_json({}, added, "", name)
    alphabet = byte_alphabet()
    vocabulary = {"".join(alphabet[byte] for byte in token): i for token, i in model.ranks.items()}
    content["model"] |= {"vocab": vocabulary, "merges": metadata[f"{_KEY}.merges"], "ignore_merges": False}
    byte_level = content["pre_tokenizer"]["pretokenizers"][-1]
    splits = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in _BY_MERGES[_pre(metadata, path)]
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
        names = {pattern: name for name, pattern in reversed(list(_BY_IDS.items()))}
        if not isinstance(model, RankedBytes) or model.pattern not in names:
            raise Llama4Error(f"{path} splits text in a way that GGUF has no name for; keep the model's layout")
        content = to_json(model.ranks, (), model.pattern)["model"]
        for token, i in content["vocab"].items():
            tokens[i], kinds[i] = token, Kind.NORMAL
        merges = [f"{left} {right}" for left, right in content["merges"]]
        keys |= {"model": "gpt2", "pre": names[model.pattern], "merges": merges}
    for token in added:
        tokens[token.id], kinds[token.id] = token.content, Kind.CONTROL if token.special else Kind.USER_DEFINED
    keys |= {"tokens": tokens, "token_type": np.array(kinds, np.int32), "add_bos_token": adds_bos}
    return {f"{_KEY}.{key}": value for key, value in keys.items()}
