"""SentencePiece's byte-pair encoding, as Llama 1, Llama 2 and Code Llama have it: text <-> ids over a list of pieces.

A blank is written as U+2581. Of two neighbouring pieces that make up a third, those are merged first whose result has
the highest score, the leftmost on ties; characters that are no piece are written as bytes. Source: sentencepiece's
bpe_model.cc, normalizer.cc and sentencepiece_processor.cc, which tests compare with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from llama4.errors import Llama4Error
from llama4.patterns import longest_of
from llama4.reading import MAX_TOKENIZER_BYTES, read_bytes
from llama4.text.added_tokens import AddedToken
from llama4.text.pairs import merge_pairs
from llama4.text.protobuf import Field, field, floating, read_message

BLANK = "\u2581"
_UNKNOWN_TEXT = " \u2047 "
_WORD = re.compile(f"{BLANK}*[^{BLANK}]*")
_CACHED_WORDS = 1 << 16
_BPE = 2
"""`model_type` of a TrainerSpec."""


class Kind(IntEnum):
    """Of a piece; GGUF has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text, with U+2581 for blanks, and how early it is merged."""

    text: str
    score: float = 0.0
    kind: Kind = Kind.NORMAL


@dataclass(frozen=True)
class Normalizer:
    """What becomes of a text before it is cut.

    Attributes:
        adds_blank: whether a text begins with a blank that it does not have.
        removes_blanks: whether blanks at its ends, and all but one of several, go.
        charsmap: what characters are replaced by, as sentencepiece compiles it; empty for nothing.
    """

    adds_blank: bool = True
    removes_blanks: bool = False
    charsmap: bytes = b""

    def __call__(self, text: str) -> str:
        if self.charsmap:
            text = _replaced(text, self.charsmap)
        if self.removes_blanks:
            text = re.sub(" +", " ", text.strip(" "))
        if self.adds_blank and text:
            text = " " + text
        return text.replace(" ", BLANK)


class SentencePiece:
    """Text <-> ids.

    Args:
        pieces: in order of id.
        normalizer: what is done to a text first.
        controls: pieces that no text becomes, though they are ordinary ones in the file.
        merges: the rank of each pair that is merged, where that is not told by scores.

    Attributes:
        ranks: text of a piece -> id.
    """

    pattern = ""

    def __init__(
        self,
        pieces: Sequence[Piece],
        normalizer: Normalizer | None = None,
        controls: frozenset[str] = frozenset(),
        merges: Mapping[tuple[str, str], int] | None = None,
    ) -> None:
        self.pieces = pieces
        self.normalizer = normalizer or Normalizer()
        self.ranks = {piece.text.encode(): i for i, piece in reversed(list(enumerate(pieces)))}
        mergeable = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
        self._ids = {
            piece.text: i
            for i, piece in reversed(list(enumerate(pieces)))
            if piece.kind in mergeable and piece.text not in controls
        }
        self._merges, self._controls = merges, controls
        self._unused = {piece.text for piece in pieces if piece.kind is Kind.UNUSED}
        self._byte_ids = {_byte_of(piece.text): i for i, piece in enumerate(pieces) if piece.kind is Kind.BYTE}
        self._unknown = next((i for i, piece in enumerate(pieces) if piece.kind is Kind.UNKNOWN), None)
        whole = [p.text for p in pieces if p.kind is Kind.USER_DEFINED and p.text in self._ids]
        self._whole = re.compile(longest_of(whole)) if whole else None
        # Where no piece goes on behind a word, words are independent of each other, and most are seen again.
        across = re.compile(f"[^{BLANK}]{BLANK}")
        self._words_apart = not any(across.search(text) for text in self._ids)
        self._cached = lru_cache(_CACHED_WORDS)(self._merge)
        keeps = len(self._byte_ids) == 256 and not self.normalizer.charsmap and not self.normalizer.removes_blanks
        self.longest = max(map(len, self.ranks)) if keeps else None

    def encode(self, text: str, *, blank: bool = True, most: float = math.inf) -> list[int]:
        """Text -> ids.

        Args:
            blank: whether a blank is put before it, if this vocabulary does so at all.
            most: soon after so many ids the rest of the text is left.
        """
        ids: list[int] = []
        for part, is_whole in self._parts(self._normalized(text, blank)):
            if is_whole:
                ids.append(self._ids[part])
            elif self._words_apart:
                for match in _WORD.finditer(part):
                    word = match.group()
                    ids += self._cached(word) if len(word) <= 64 else self._merge(word)
                    if len(ids) > most:
                        break
            else:
                ids += self._merge(part)
            if len(ids) > most:
                break
        return self._without_runs(ids)

    def _normalized(self, text: str, blank: bool) -> str:
        normal = self.normalizer(text)
        return normal[1:] if self.normalizer.adds_blank and not blank else normal

    def controls(self) -> list[AddedToken]:
        """The pieces that no text becomes."""
        kinds = (Kind.CONTROL, Kind.UNKNOWN)
        return [
            AddedToken(i, piece.text, special=True, normalized=False)
            for i, piece in enumerate(self.pieces)
            if piece.text and (piece.kind in kinds or piece.text in self._controls)
        ]

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 of a token.

        Raises:
            IndexError: there is no such token.
        """
        if i < 0:
            raise IndexError(i)
        piece = self.pieces[i]
        if piece.kind is Kind.BYTE:
            return bytes([_byte_of(piece.text)])
        if piece.kind is Kind.UNKNOWN:
            return _UNKNOWN_TEXT.encode()
        return piece.text.replace(BLANK, " ").encode()

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text, cut at pieces that are never merged."""
        at = 0
        for match in self._whole.finditer(text) if self._whole is not None else ():
            if at < match.start():
                yield text[at : match.start()], False
            yield match.group(), True
            at = match.end()
        if at < len(text):
            yield text[at:], False

    def _priority(self, left: str, right: str) -> float | None:
        """What is merged first has the lowest; None if the two are not merged."""
        if self._merges is not None:
            return self._merges.get((left, right))
        i = self._ids.get(left + right)
        return None if i is None else -self.pieces[i].score

    def _merge(self, text: str) -> tuple[int, ...]:
        splits: dict[str, tuple[str, str]] | None = {} if self._unused else None
        symbols = merge_pairs(list(text), self._priority, splits)
        ids: list[int] = []
        for symbol in symbols:
            ids += self._ids_of(symbol, splits or {})
        return tuple(ids)

    def _ids_of(self, symbol: str, splits: Mapping[str, tuple[str, str]]) -> Iterator[int]:
        pending = [symbol]
        while pending:
            part = pending.pop()
            if part in self._unused and part in splits:
                pending += reversed(splits[part])
            elif part in self._ids:
                yield self._ids[part]
            else:
                yield from self._bytes_of(part)

    def _bytes_of(self, text: str) -> Iterator[int]:
        data = text.encode()
        if all(byte in self._byte_ids for byte in data):
            yield from (self._byte_ids[byte] for byte in data)
        elif self._unknown is not None:
            yield self._unknown

    def _without_runs(self, ids: list[int]) -> list[int]:
        """Several unknown characters in a row are one token."""
        if self._unknown not in ids:
            return ids
        return [i for at, i in enumerate(ids) if not (i == self._unknown and at and ids[at - 1] == i)]


def _byte_of(text: str) -> int:
    """`<0x0A>` -> 10.

    Raises:
        Llama4Error: another text.
    """
    if not re.fullmatch("<0x[0-9A-F]{2}>", text):
        raise Llama4Error(f"a vocabulary has {text!r:.80} for a byte; it should be like '<0x0A>'; fetch it again")
    return int(text[3:5], 16)


def is_sentencepiece(path: Path) -> bool:
    """Whether a tokenizer.model is SentencePiece's: it begins with a piece, a tiktoken's with a line of base64."""
    with path.open("rb") as file:
        return file.read(1) == b"\x0a"


def read_sentencepiece(path: Path, controls: frozenset[str] = frozenset()) -> SentencePiece:
    """A `tokenizer.model` of sentencepiece, a protobuf message ModelProto.

    Raises:
        Llama4Error: a file that is damaged, or a model that is no BPE.
    """
    try:
        message = read_message(read_bytes(path, MAX_TOKENIZER_BYTES))
        pieces = [_read_piece(read_message(each)) for each in _all(message, 1)]
        trainer = read_message(_last(message, 2, b""))
        normalizer = read_message(_last(message, 3, b""))
    except (ValueError, TypeError) as error:
        raise Llama4Error(f"{path} is no model of sentencepiece ({error}); fetch the tokenizer again") from None
    if (kind := _last(trainer, 3, 1)) != _BPE:
        name = {1: "a unigram model", 3: "a model of words", 4: "a model of characters"}.get(kind, f"of kind {kind}")
        raise Llama4Error(f"{path} is {name}; Llama's are BPE, which is read: take the tokenizer of the model")
    if not pieces:
        raise Llama4Error(f"{path} holds no pieces; fetch the tokenizer again")
    charsmap = _last(normalizer, 2, b"")
    if charsmap and not _is_charsmap(charsmap):
        raise Llama4Error(f"{path} has a map of characters that is none; fetch the tokenizer again")
    rules = Normalizer(
        adds_blank=bool(_last(normalizer, 3, 1)),
        removes_blanks=bool(_last(normalizer, 4, 1)),
        charsmap=charsmap,
    )
    return SentencePiece(pieces, rules, controls)


def sentencepiece_bytes(model: SentencePiece) -> bytes:
    """The content of a `tokenizer.model` with these pieces, for sentencepiece's own reader and this one."""
    pieces = [field(1, p.text.encode()) + field(2, float(p.score)) + field(3, int(p.kind)) for p in model.pieces]
    has_bytes = any(piece.kind is Kind.BYTE for piece in model.pieces)
    trainer = field(3, _BPE) + field(35, int(has_bytes))  # model_type, byte_fallback
    rules = model.normalizer
    normalizer = field(1, b"identity") + field(2, rules.charsmap)
    normalizer += field(3, int(rules.adds_blank)) + field(4, int(rules.removes_blanks)) + field(5, 1)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def _read_piece(message: Sequence[Field]) -> Piece:
    return Piece(_last(message, 1, b"").decode(), floating(_last(message, 2, b"\0\0\0\0")), Kind(_last(message, 3, 1)))


def _all(message: Sequence[Field], number: int) -> list[Any]:
    return [each.value for each in message if each.number == number]


def _last(message: Sequence[Field], number: int, default: Any) -> Any:
    """A field's value.

    Raises:
        TypeError: one of another type than the default.
    """
    value = next((each.value for each in reversed(message) if each.number == number), default)
    if type(value) is not type(default):
        raise TypeError(f"field {number} is {type(value).__name__}")
    return value


def _is_charsmap(charsmap: bytes) -> bool:
    """Whether it has a trie, and texts of which the last one ends."""
    size = int.from_bytes(charsmap[:4], "little")
    return size >= 4 and size % 4 == 0 and len(charsmap) > 4 + size and charsmap.endswith(b"\0")


def _replaced(text: str, charsmap: bytes) -> str:
    """A text with the longest matches of a compiled map of characters replaced: four bytes, the size of a double-array
    trie; the trie, in 32-bit units; and what its values point into, texts that end with a zero."""
    size = int.from_bytes(charsmap[:4], "little")
    units = memoryview(charsmap[4 : 4 + size]).cast("I")
    texts, data, out, at = charsmap[4 + size :], text.encode(), bytearray(), 0
    while at < len(data):
        found = _longest(units, data, at)
        if found is None:
            length = _length_of(data[at])
            out += data[at : at + length]
        else:
            length, start = found
            out += texts[start : texts.find(b"\0", start)]  # the last one ends so, see `_is_charsmap`
        at += length
    return out.decode(errors="replace")


def _longest(units: memoryview, data: bytes, at: int) -> tuple[int, int] | None:
    """The longest key of a double-array trie (darts-clone) that data has at a place: its length, and its value."""

    def offset(unit: int) -> int:
        return (unit >> 10) << ((unit & (1 << 9)) >> 6)

    found, node = None, offset(units[0])
    for length, byte in enumerate(memoryview(data)[at:], 1):
        node ^= byte
        if node >= len(units) or units[node] & ((1 << 31) | 0xFF) != byte:
            break
        unit = units[node]
        node ^= offset(unit)
        if node >= len(units):
            break
        if unit >> 8 & 1:
            found = length, units[node] & ((1 << 31) - 1)
    return found


def _length_of(first: int) -> int:
    """Bytes of a character of UTF-8, by its first."""
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
