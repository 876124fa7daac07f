"""Patterns that files bring along."""

from __future__ import annotations

import random
import re

import pytest

from llama4 import patterns
from llama4.patterns import Patience, compile_pattern
from llama4.text.vocabulary import special_token_names


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\(?R(unning)?", "(Running"),
        (r"\(?1?\d{3}\)?", "(155)"),
        (r"a\\\(?&?", r"a\(&"),
        (r"(?P<a>b)(?P=a)", "bb"),
        (r"(b)?(?(1)c|d)", "bc"),
        (r"[(]?R", "(R"),
    ],
)
def test_what_looks_like_a_call(pattern: str, text: str) -> None:
    assert compile_pattern(pattern).fullmatch(text)


@pytest.mark.parametrize(
    "pattern",
    ["(?R)", "a(?0)", r"\\(?R)", r"a\\\\(?1)", "(?P<a>(?&a))", "(?P<a>(?P>a))", "(?x)(?P<a>b(?P >a))", "(?P<a>(?P&a))"],
)
def test_what_calls_itself_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"calls itself by .*\(\?.*; write out what is to be repeated"):
        compile_pattern(pattern)


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="has 16385 characters; write a pattern of 16384 at most"):
        compile_pattern("a" * (patterns._MAX_CHARACTERS + 1))


def test_patience() -> None:
    assert 59 < Patience(60).left() <= 60
    with pytest.raises(TimeoutError):
        Patience(0).left()


@pytest.mark.parametrize("groups", [0, 1, 2, 50])
def test_the_longest_name_is_found(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MAX_GROUPS", groups)
    draw = random.Random(groups)
    for _ in range(300):
        names = {"".join(draw.choices("ab<.|", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 12))}
        found = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        text = "".join(draw.choices("ab<.|", k=60))
        assert re.findall(patterns.longest_of(names), text) == found.findall(text), names


def test_names_are_told_apart_by_their_beginnings() -> None:
    """Two thousand names that begin alike are not tried one after the other at every "<|" of a text."""
    names = special_token_names()
    pattern = patterns.longest_of(names)
    assert len(pattern) < len("|".join(names)) / 5
    assert all(re.fullmatch(pattern, name) for name in names)
    re.compile(patterns.longest_of("a" * i for i in range(1, 400)))
