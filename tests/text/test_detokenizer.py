"""Text from the bytes of tokens: whole characters, and what a stop string may have begun."""

from __future__ import annotations

import random

import pytest

from llama4.text.detokenizer import TextAssembler


def assemble(data: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    assembler, pieces = TextAssembler(stop), []
    for each in data:
        pieces.append(assembler.push(each))
        if assembler.stopped:
            break
    return [*pieces, assembler.finish()], assembler.stopped


def test_characters_come_whole() -> None:
    text = "naïve 東京 🦙👩‍👩‍👧 ğ"
    pieces, _ = assemble([bytes([byte]) for byte in text.encode()])
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_invalid_bytes_are_replaced_and_a_cut_character_is_left_out() -> None:
    assert "".join(assemble([b"a\xff", b"b", "é".encode()[:1]])[0]) == "a\ufffdb"


@pytest.mark.parametrize("stop", [("END",), ("\n\n",), ("ND", "END"), ("aab",), ("é!",), ("zzz",), ("b", "abc")])
@pytest.mark.parametrize("text", ["say END now", "a\n\nb", "EEND", "aaaab", "oui é! non", "EN", "aabaab", "abc"])
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stop: tuple[str, ...]) -> None:
    """The reference looks at every beginning of the text, character by character."""
    ends = [
        (end, text[:end].index(s))
        for end in range(len(text) + 1)
        for s in sorted(stop, key=len)
        if text[:end].endswith(s)
    ]
    end = min((end for end, _ in ends), default=None)
    expected = text if end is None else text[: min(at for e, at in ends if e == end)]
    data = text.encode()
    rng = random.Random(0)
    for _ in range(30):
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(6)))
        pieces, stopped = assemble([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)], stop)
        assert "".join(pieces) == expected
        assert stopped == (end is not None)


def test_text_is_held_back_only_while_a_stop_string_may_come() -> None:
    assembler = TextAssembler(["<end>"])
    assert [assembler.push(piece) for piece in (b"a<e", b"n", b"x<", b"<end", b">")] == ["a", "", "<enx", "<", ""]
    assert assembler.stopped


def test_a_stop_string_does_not_reach_across_a_special_token() -> None:
    text = TextAssembler(["abc"])
    assert text.push(b"xab\xc3") == "x"
    assert text.flush() == "ab"  # before the mark of a call
    assert text.push(b"\xa9c") == "éc"  # half a character stays
    assert not text.stopped
