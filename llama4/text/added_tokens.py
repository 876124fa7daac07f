"""Added tokens: what a tokenizer's files put on top of its ranks, and how a text is cut at those of them that are text.

The rules are those of the library `tokenizers` (tokenizer/added_vocabulary.rs, with `encode_special_tokens`), so that a
text has the ids that a model was trained with: of tokens that begin at the same place the longest counts, and none
begins inside another. A special token is never found in a text, and neither is what lies inside its name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for its whole content.

    Attributes:
        content: the text that it is; of a special token the name, such as `<|eot|>`.
        special: whether it is a control token, which prompts alone are made of: no text becomes it, no reply shows it.
        single_word: it is found only where no word goes on before or after it.
        lstrip, rstrip: white space before or after it belongs to it.
        normalized: it is found only in what lies between those that are not (Llama 4 normalises nothing).
    """

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


class AddedTokenSplitter:
    """Cuts texts at added tokens."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        tokens = list(tokens)
        rounds = ([token for token in tokens if token.normalized is normalized] for normalized in (False, True))
        self._rounds = [_Finder(found) for found in rounds if not all(token.special for token in found)]

    def split(self, text: str) -> Iterator[int | str]:
        """The ids of the tokens in a text, and the pieces between them, in order."""
        pieces: Iterable[int | str] = (text,)
        for finder in self._rounds:
            pieces = [
                part for piece in pieces for part in (finder.split(piece) if isinstance(piece, str) else (piece,))
            ]
        yield from pieces


_SPACE = "".join(
    map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)
_SPACES = re.compile(f"[{_SPACE}]*")
"""`\\s` in Rust: Unicode's White_Space."""
_CIRCLED_LETTERS = (range(0x24B6, 0x24EA), range(0x1F130, 0x1F14A), range(0x1F150, 0x1F16A), range(0x1F170, 0x1F18A))


class _Finder:
    """One search for some of the tokens."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        # Most places are ruled out by two characters; the others are looked up, the longest content first.
        lengths: dict[str, set[int]] = {}
        for content in self._tokens:
            lengths.setdefault(content[:2], set()).add(len(content))
        self._lengths = {
            head: sorted(found | lengths.get(head[:1], set()), reverse=True) for head, found in lengths.items()
        }
        self._head = re.compile("|".join(map(re.escape, sorted(lengths, key=len, reverse=True))))

    def split(self, text: str) -> Iterator[int | str]:
        start = 0
        for token, begin in self._find(text):
            end = begin + len(token.content)
            if token.special or (
                token.single_word and (_in_word(text[max(begin - 1, 0) : begin]) or _in_word(text[end : end + 1]))
            ):
                continue
            if token.lstrip:
                begin = start + len(text[start:begin].rstrip(_SPACE))
            if token.rstrip and (spaces := _SPACES.match(text, end)):
                end = spaces.end()
            if begin >= end:  # it is white space that belongs to the token before
                continue
            if start < begin:
                yield text[start:begin]
            yield token.id
            start = end
        if start < len(text):
            yield text[start:]

    def _find(self, text: str) -> Iterator[tuple[AddedToken, int]]:
        at = 0
        while match := self._head.search(text, at):
            at = match.start()
            contents = (text[at : at + length] for length in self._lengths[match.group()])
            token = next((self._tokens[content] for content in contents if content in self._tokens), None)
            if token is not None:
                yield token, at
            at += len(token.content) if token is not None else 1


def _in_word(character: str) -> bool:
    r"""`\w` in Rust: letters (circled ones, too), marks, decimal digits, letter numbers, connectors and joiners."""
    if not character:
        return False
    category = unicodedata.category(character)
    return (
        category[0] in "LM"
        or category in ("Nd", "Nl", "Pc")
        or character in "\u200c\u200d"
        or any(ord(character) in letters for letters in _CIRCLED_LETTERS)
    )
