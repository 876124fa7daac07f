"""Patterns that files bring along."""

from __future__ import annotations

import pytest

from llama4 import patterns
from llama4.patterns import Patience, compile_pattern


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
