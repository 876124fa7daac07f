"""Text <-> token ids: Llama 4's byte-level BPE on tiktoken, read from either of the two files it is published in.

The text's own characters never become special tokens: `encode` knows none, and `special_tokens` gives their ids to the
code that builds prompts (`llama4.chat`).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is cut before byte pairs are merged, as o200k does it."""

NUM_SPECIAL_TOKENS = 2048

# The pattern's lookahead backtracks over blanks, and its engine gives up at a million of them. So a long run of blanks
# is cut out here, into the very piece that the pattern would make of it: all of it, or all but the last if text
# follows. (Blanks before a line break belong to another alternative, which does not backtrack.)
_BLANK = "\\t\\x0b\\x0c\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
_LONG_BLANK = re.compile(rf"(?<![{_BLANK}])[{_BLANK}]{{100000,}}+(?![\r\n])")

_NAMES = {
    "text_post_train": (
        "<|header_start|> <|header_end|> <|eom|> <|eot|> <|step|> {6} <|python_start|> <|python_end|> "
        "<|finetune_right_pad|> {~2} {61}"
    ),
    "vision": (
        "<|image_start|> <|image_end|> {2} <|tile_x_separator|> <|tile_y_separator|> {4} <|image|> {1} <|patch|> {1041}"
    ),
    "reasoning": "{8} <|reasoning_thinking_start|> <|reasoning_thinking_end|>",
}
"""Special tokens by group, in order of id. {n}: n reserved names, numbered through the group; {~n}: skip n numbers."""


def special_token_names(count: int = NUM_SPECIAL_TOKENS) -> list[str]:
    """The first `count` of the special tokens of Llama 4, in order of id."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    for group, layout in _NAMES.items():
        number = 0
        for word in layout.split():
            if word.startswith("{~"):
                number += int(word[2:-1])
            elif word.startswith("{"):
                end = number + int(word[1:-1])
                names += [f"<|{group}_reserved_special_token_{i}|>" for i in range(number, end)]
                number = end
            else:
                names.append(word)
    names += [f"<|reserved_special_token_{i}|>" for i in range(count - len(names))]
    return names[:count]


class Tokenizer:
    """Byte-level BPE with Llama 4's special tokens.

    Args:
        path: tiktoken's `tokenizer.model`, Hugging Face's `tokenizer.json`, or a directory with one of them (if both
            are there, `tokenizer.json`, which lists its special tokens itself).
        num_special_tokens: how many special tokens follow the ranks of a `tokenizer.model`; a `tokenizer.json` says so
            itself.
    Raises:
        FileNotFoundError: neither file is there.
        ValueError: the file is not what its name says, or its tokenizer is not a byte-level BPE.
    """

    special_tokens: dict[str, int]
    """Name, such as `<|eot|>`, -> id."""
    vocab_size: int
    """Highest id + 1."""

    def __init__(self, path: str | Path, *, num_special_tokens: int = NUM_SPECIAL_TOKENS) -> None:
        self.path = _find(Path(path).expanduser())
        if self.path.suffix == ".json":
            ranks, self.special_tokens, pattern = _read_json(self.path)
        else:
            if num_special_tokens < 0:
                raise ValueError(f"num_special_tokens is {num_special_tokens}; it counts tokens, so at least 0")
            ranks, pattern = _read_ranks(self.path), PATTERN
            first = max(ranks.values()) + 1
            self.special_tokens = {name: first + i for i, name in enumerate(special_token_names(num_special_tokens))}
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(
                f"{self.path} has no token for {len(missing)} of the 256 bytes (the first: {missing[0]:#04x}), so some "
                "text could not be encoded; a byte-level vocabulary needs all of them"
            )
        self.ranks = ranks
        self.pattern = pattern
        self.vocab_size = 1 + max(max(ranks.values()), *self.special_tokens.values(), 0)
        self._encoding = tiktoken.Encoding(
            self.path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    def encode(self, text: str) -> list[int]:
        """Text -> ids; every character is text, `<|eot|>` too.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` holds half of a surrogate pair, which no UTF-8 can spell.
        """
        if not isinstance(text, str):
            raise TypeError(f"can only encode str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate pair; remove it, "
                "or decode the text it came from with errors='replace'"
            ) from None
        ids: list[int] = []
        start = 0
        for run in _LONG_BLANK.finditer(text):
            stop = run.end() if run.end() == len(text) else run.end() - 1
            ids += self._encoding.encode_ordinary(text[start : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : stop])
            start = stop
        ids += self._encoding.encode_ordinary(text[start:] if start else text)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> UTF-8 bytes, perhaps with half a character at either end; special tokens are spelt out.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            wrong = next(i for i in ids if not self._is_token(i))
            raise ValueError(f"{wrong} is not the id of a token; this vocabulary has {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; bytes that are no whole character become U+FFFD, special tokens are spelt out."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            ValueError: this vocabulary has no such token.
        """
        try:
            return self.special_tokens[name]
        except KeyError:
            raise ValueError(
                f"{self.path} has no special token {name!r}, which Llama 4's prompts need; use the tokenizer that "
                "belongs to the model"
            ) from None

    @cached_property
    def bos_id(self) -> int:
        """`<|begin_of_text|>`, the first token of every prompt."""
        return self.special("<|begin_of_text|>")

    @cached_property
    def pad_id(self) -> int:
        """`<|finetune_right_pad|>`, which fills the rows of a batch."""
        return self.special("<|finetune_right_pad|>")

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply: `<|end_of_text|>`, `<|eom|>` and `<|eot|>`."""
        names = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
        return tuple(self.special_tokens[name] for name in names if name in self.special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, from which transformers builds the same tokenizer, and
        `tokenizer.model` if that is what this one was read from."""
        directory = Path(directory)
        copy = directory / ("tokenizer.json" if self.path.suffix == ".json" else "tokenizer.model")
        if copy.resolve() != self.path.resolve():
            shutil.copyfile(self.path, copy)
        if self.path.suffix != ".json":
            (directory / "tokenizer.json").write_text(json.dumps(self._to_json(), ensure_ascii=False), "utf-8")
        roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
            role: name for role, name in roles.items() if name in self.special_tokens
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def _to_json(self) -> dict[str, Any]:
        """The content of a Hugging Face tokenizer.json. Any two tokens that make up a third may merge into it."""
        alphabet = byte_alphabet()
        vocabulary = {"".join(alphabet[byte] for byte in token): rank for token, rank in self.ranks.items()}
        merges = []
        for token in sorted(vocabulary, key=vocabulary.__getitem__):
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
            merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name} | flags for name, i in self.special_tokens.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
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

    def _is_token(self, i: int) -> bool:
        try:
            self._encoding.decode_single_token_bytes(i)
        except (KeyError, OverflowError):
            return False
        return True


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"no tokenizer.json or tokenizer.model in {path}; copy the model's there")
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; give a tokenizer.model, a tokenizer.json or their directory")
    return path


def _read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's format: on each line a token in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"line {number} of {path} is {line[:40]!r}, not a token in base64 and its rank; is it tiktoken's "
                "tokenizer.model, whole?"
            ) from None
    if not ranks:
        raise ValueError(f"{path} holds no tokens; fetch the tokenizer again")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks in {path} are not 0 to {len(ranks) - 1}, each once; fetch the tokenizer again")
    return ranks


def _read_json(path: Path) -> tuple[dict[bytes, int], dict[str, int], str]:
    """Hugging Face's format -> ranks of the byte strings, special tokens, and the pattern that cuts the text."""
    try:
        data = json.loads(path.read_bytes())
        model: dict[str, Any] = data["model"]
        added = {str(token["content"]): int(token["id"]) for token in data.get("added_tokens") or []}
        vocabulary: dict[str, int] = model["vocab"]
        kind = model.get("type", "BPE")
        merges = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a Hugging Face tokenizer.json ({error!r}); fetch the tokenizer again"
        ) from None
    if kind != "BPE" or not _mentions(data, "ByteLevel") or model.get("byte_fallback"):
        raise ValueError(
            f"{path} holds a {kind} tokenizer that is not a byte-level BPE; Llama 4's is one: use the tokenizer that "
            "belongs to the model"
        )
    if data.get("normalizer"):
        raise ValueError(f"{path} normalises text before it encodes it, which Llama 4's tokenizer does not")
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    try:
        ranks = {
            bytes(byte_of[character] for character in token): int(rank)
            for token, rank in vocabulary.items()
            if token not in added
        }
    except KeyError as error:
        raise ValueError(f"{path}: {error} is no byte of the byte-level alphabet; is this Llama 4's file?") from None
    merged = [vocabulary.get(token, -1) for token in merges]
    if merged != sorted(merged):
        raise ValueError(f"{path} merges in another order than its ids, which tiktoken's ranks cannot express")
    pattern = _split_pattern(data.get("pre_tokenizer"))
    if pattern is None:
        raise ValueError(f"{path} does not cut text by a regular expression of its own, as Llama 4's tokenizer does")
    return ranks, added, pattern


def _split_pattern(node: Any) -> str | None:
    """The regular expression of the first `Split` in a pre-tokenizer, if there is one."""
    if not isinstance(node, dict):
        return None
    if node.get("type") == "Split" and isinstance(node.get("pattern"), dict):
        pattern = node["pattern"].get("Regex")
        return pattern if isinstance(pattern, str) else None
    found = (_split_pattern(child) for child in node.get("pretokenizers", []))
    return next((pattern for pattern in found if pattern), None)


def _mentions(data: dict[str, Any], kind: str) -> bool:
    """Whether the pre-tokenizer or the decoder is, or contains, one of this type."""
    nodes = [data.get("pre_tokenizer"), data.get("decoder")]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if node.get("type") == kind:
                return True
            nodes += [*node.get("pretokenizers", []), *node.get("decoders", [])]
    return False


def byte_alphabet() -> dict[int, str]:
    """The printable characters that stand for the 256 bytes in a tokenizer.json: visible Latin-1 for itself, the rest
    from U+0100 on, in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
