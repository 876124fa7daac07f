"""Figures as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from llama4.units import MIN_CONTEXT, bytes_text, dtype_name, parse_bytes, parse_rate, parse_tokens, time_text


def test_tokens_are_binary_as_windows_are() -> None:
    assert [parse_tokens(text) for text in ("131072", "128K", "1M", "10M", " 1.5k ")] == [
        131_072,
        131_072,
        1_048_576,
        10_485_760,
        1536,
    ]


def test_bytes_and_rates() -> None:
    sizes = [parse_bytes(text) for text in ("80GiB", "80GB", "80g", "1.5 TiB", "4096B", "80000000")]
    assert sizes == [80 * 2**30, 80 * 10**9, 80 * 10**9, 3 * 2**39, 4096, 80_000_000]
    assert [parse_rate(text) for text in ("3.35TB/s", "990TFLOP/s", "400 GFLOPS", "50G")] == [
        3.35e12,
        990e12,
        400e9,
        50e9,
    ]


@pytest.mark.parametrize("parse", [parse_tokens, parse_bytes, parse_rate])
@pytest.mark.parametrize("text", ["", "ten", "-5", "0", "10X", "1e9", "10 M M", "nan", "9" * 400])
def test_anything_else_is_refused_by_name(parse, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="is not"):
        parse(text)


def test_texts() -> None:
    assert [time_text(s) for s in (2e-6, 0.0123, 1.5, 90, 200, 9000, 1e6)] == [
        "2 us",
        "12.3 ms",
        "1.5 s",
        "90 s",
        "3.33 min",
        "2.5 h",
        "11.6 days",
    ]
    assert [time_text(s) for s in (0, 9.996e-4, 0.9999, 119.99, 7199, 1e8, 1e12)] == [
        *("0 us", "1 ms", "1 s", "2 min", "2 h", "1,160 days", "11,600,000 days"),
    ]
    assert [bytes_text(n) for n in (100, 2**20, 1.5 * 2**30, 2**52)] == ["100 bytes", "1.0 MiB", "1.5 GiB", "4096 TiB"]


def test_dtypes_have_two_names() -> None:
    assert [dtype_name(text) for text in ("bf16", "bfloat16", "f32", "int4")] == [
        "bfloat16",
        "bfloat16",
        "float32",
        "int4",
    ]


@pytest.mark.parametrize(
    ("read", "remedy"),
    [
        (lambda: parse_bytes("80"), "'80' has no unit, so it is 80 bytes; write 80GiB, or 80B if so few are meant"),
        (lambda: parse_bytes("1048575"), "write 1048575GiB"),
        (lambda: parse_rate("2.4"), "write 2.4G or 2.4T"),
        (lambda: parse_tokens("128", MIN_CONTEXT), "'128' has no unit, so it is 128 tokens; write 128K or 128M"),
    ],
)
def test_a_unit_that_was_forgotten(read: Callable[[], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(remedy)):
        read()
    assert (parse_bytes("1048576"), parse_tokens("256", MIN_CONTEXT), parse_tokens("8")) == (2**20, 256, 8)
