"""Byte-level BPE: a text is split into pieces by regular expressions, and the bytes of each are merged.

`RankedBytes` merges any two tokens that make up a third, in order of their ids, as tiktoken does; `MergedBytes` those
that a list names, as Hugging Face's `tokenizers` does.
"""

from __future__ import annotations

import math
import re
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import tiktoken

from llama4.patterns import Patience, compile_pattern
from llama4.text.pairs import merge_pairs
from llama4.text.vocabulary import LLAMA3, LLAMA4, TEKKEN

# In o200k's pattern the lookahead `\s+(?!\S)` backtracks over blanks, and the regex engine fails at a million of them.
# A long run of blanks is therefore cut out here, as the piece that the pattern would make of it: the whole run, or all
# but its last blank if text follows. (Blanks before a line break match an alternative that does not backtrack.)
_BLANK = "\\t\\x0b\\x0c\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
_LONG_BLANK = re.compile(rf"(?<![{_BLANK}])[{_BLANK}]{{100000,}}+(?![\r\n])")
_CACHED_WORDS = 1 << 16

_LINEAR = frozenset((LLAMA4.pattern, LLAMA3.pattern, TEKKEN))
"""Patterns that tiktoken itself splits by: with the blanks cut out they take as long as the text is. With others it may
go back and forth without end, or panic."""

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 splits text, and `ByteLevel` of Hugging Face's `tokenizers`."""

_PART = 1 << 18
"""Characters of a long text that tiktoken reads at once. It does not stop, and the list of its ids is made while no
other thread goes on."""
_CUT = re.compile(r"(?<=\S) ")
"""Where every pattern of `_LINEAR` cuts, whatever is around: nothing that it matches goes on with a blank behind
anything else than white space."""

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
_SHRINKS = 4
"""Bytes of a text, in UTF-8, that become one in one of Unicode's normal forms, at most: U+1D400 becomes "A"."""


class Splitter:
    """Cuts at the matches of a regular expression, which are pieces, too, as is what is between them unless
    `only_matches`.

    Raises:
        ValueError: no regular expression, or one that is too long or calls itself.
    """

    def __init__(self, pattern: str, *, only_matches: bool = False) -> None:
        self.only_matches = only_matches
        self.pattern, self._compiled = pattern, compile_pattern(pattern)

    def __call__(self, text: str, patience: Patience) -> Iterator[str]:
        """A text, or a piece of one -> its pieces.

        Args:
            patience: what is left of the time for all of it.

        Raises:
            ValueError: there is none left; all patterns in use leave much of it.
        """
        at, end, now = 0, patience.end, time.monotonic
        try:
            for match in self._compiled.finditer(text, timeout=patience.left()):
                if at < match.start() and not self.only_matches:
                    yield text[at : match.start()]
                if match.group():
                    yield match.group()
                at = match.end()
                if now() > end:
                    raise TimeoutError
        except TimeoutError:
            raise ValueError(
                f"{self.pattern!r:.80} takes more than {patience.seconds:.1f} s, which is the limit of all patterns "
                "for the whole of such a text"
            ) from None
        if at < len(text) and not self.only_matches:
            yield text[at:]


class RankedBytes:
    """tiktoken's.

    Args:
        name: of the file, for the library's messages.
        ranks: token -> id; each byte is one.
        pattern: what splits a text.
        splitter: what does so where the pattern is none of Llama's; by default its matches alone count, as tiktoken has
            it.
    """

    def __init__(self, name: str, ranks: Mapping[bytes, int], pattern: str, splitter: Splitter | None = None) -> None:
        self.ranks, self.pattern = ranks, pattern
        self._tokens = {i: token for token, i in ranks.items()}
        is_linear = pattern in _LINEAR
        self._split = None if is_linear else splitter or Splitter(pattern, only_matches=True)
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern if is_linear else "", mergeable_ranks=dict(ranks), special_tokens={}
        )
        drops = self._split is not None and self._split.only_matches
        self.longest = None if drops else max(map(len, ranks))

    def encode(self, text: str, *, blank: bool = True, most: float = math.inf) -> list[int]:
        """Text -> ids."""
        ids: list[int] = []
        if self._split is not None:
            for piece in self._split(text, _patience(text)):
                ids += self._encoding._encode_single_piece(piece)
                if len(ids) > most:
                    break
            return ids
        start = 0
        while start < len(text) and len(ids) <= most:
            cut = _CUT.search(text, start + _PART)
            stop = cut.start() if cut else len(text)
            ids += self._of_part(text[start:stop])
            start = stop
        return ids

    def _of_part(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for run in _LONG_BLANK.finditer(text):
            stop = run.end() if run.end() == len(text) else run.end() - 1
            ids += self._encoding.encode_ordinary(text[start : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : stop])
            start = stop
        return ids + self._encoding.encode_ordinary(text[start:] if start else text)

    def token_bytes(self, i: int) -> bytes:
        """Raises:
        KeyError: there is no such token.
        """
        return self._tokens[i]


class MergedBytes:
    """That of a tokenizer.json whose merges are not those that follow from its ids. A byte that is no token is left out
    of a text.

    Args:
        ranks: token -> id.
        merges: two tokens, in the alphabet of `characters` -> when they are merged.
        splitters: cut a text, one after the other.
        characters: byte -> the character that stands for it.
        whole: whether a piece that is a token is taken whole, whatever its merges (`ignore_merges`).
        normal_form: which of Unicode's a text is brought into first; None for none.
    """

    pattern = ""

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        merges: Mapping[tuple[str, str], int],
        splitters: Sequence[Splitter],
        characters: Mapping[int, str],
        *,
        whole: bool = False,
        normal_form: NormalForm | None = None,
    ) -> None:
        self.ranks = ranks
        self._tokens = {i: token for token, i in ranks.items()}
        self.merges, self.splitters, self._characters = merges, splitters, characters
        self._ids = {"".join(characters[byte] for byte in token): i for token, i in ranks.items()}
        self.whole, self.normal_form = whole, normal_form
        drops = len([token for token in ranks if len(token) == 1]) < 256 or any(each.only_matches for each in splitters)
        self.longest = None if drops else max(map(len, ranks)) * (1 if normal_form is None else _SHRINKS)
        self._cached = lru_cache(_CACHED_WORDS)(self._merged)

    def encode(self, text: str, *, blank: bool = True, most: float = math.inf) -> list[int]:
        """Text -> ids."""
        prepared = text if self.normal_form is None else unicodedata.normalize(self.normal_form, text)
        pieces, patience = [prepared], _patience(text)
        for splitter in self.splitters:
            pieces = [part for piece in pieces for part in splitter(piece, patience)]
        ids: list[int] = []
        for piece in pieces:
            ids += self._cached(piece) if len(piece) <= 64 else self._merged(piece)
            if len(ids) > most:
                break
        return ids

    def token_bytes(self, i: int) -> bytes:
        """Raises:
        KeyError: there is no such token.
        """
        return self._tokens[i]

    def _merged(self, piece: str) -> tuple[int, ...]:
        symbols = [symbol for byte in piece.encode() if (symbol := self._characters[byte]) in self._ids]
        if self.whole and (found := self._ids.get("".join(symbols))) is not None:
            return (found,)
        merged = merge_pairs(symbols, lambda left, right: self.merges.get((left, right)))
        return tuple(self._ids[symbol] for symbol in merged)


_PATIENCE, _PACE = 5.0, 1e4
"""Seconds, and characters a second, of patterns that do not backtrack without end."""


def _patience(text: str) -> Patience:
    """With all that cuts a text, and the pieces of it."""
    return Patience(_PATIENCE + len(text) / _PACE)
