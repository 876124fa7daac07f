"""Quantities as text: reading "10M" tokens, "80GiB" or "990TFLOP/s", writing "123M", "80.0 GiB" or "12.3 ms". And the
names of dtypes."""

from __future__ import annotations

import re

from llama4.errors import ArgumentError


def count_text(count: int) -> str:
    """123456789 -> "123M"."""
    value, units = float(count), iter(("", "K", "M", "B"))
    unit = next(units)
    while value >= 999.5 and unit != "B":
        value, unit = value / 1000, next(units)
    return f"{value:.1f}{unit}" if value < 9.95 and unit else f"{value:.0f}{unit}"


def bytes_text(size: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    value, units = float(size), iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.1f} {unit}" if value < 99.95 and unit != "bytes" else f"{value:.0f} {unit}"


def time_text(seconds: float) -> str:
    """0.0123 -> "12.3 ms"."""
    value = 0.0
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us")):
        value = float(f"{seconds / size:.3g}")
        if value >= (2 if size > 1 else 1):
            return f"{value:,.15g} {unit}"
    return f"{value:g} us"


_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}


def dtype_name(text: str) -> str:
    """torch's name of a dtype that is written in short: "bf16" -> "bfloat16"; all else as it is."""
    return _DTYPE_NAMES.get(text, text)


MIN_CONTEXT = 256
"""Tokens of a context that may be given without K or M: who writes 128 means 128K."""


def parse_tokens(text: str, least: int = 1) -> int:
    """ "131072", "128K" or "10M" -> tokens. K is 1024 and M 1024^2, as in a window of "10M", which is 10,485,760.

    Args:
        least: fewer are refused, if they have no unit.

    Raises:
        Llama4Error: anything else.
    """
    units = {"": 1, "K": 2**10, "M": 2**20}
    return _parse(
        text, r"([KM]?)", units, "a number of tokens: 131072, 128K or 10M", least, "tokens; write {0}K or {0}M"
    )


def parse_bytes(text: str) -> int:
    """ "80GiB" (2^30), "80GB" (10^9) -> bytes. Less than a MiB needs a unit ("80B"): who writes 80 means 80GiB.

    Raises:
        Llama4Error: anything else.
    """
    units = {"": 1} | {f"{prefix}I": 1024**i for i, prefix in enumerate("KMGT", 1)}
    units |= {prefix: 1000**i for i, prefix in enumerate("KMGT", 1)}
    remedy = "bytes; write {0}GiB, or {0}B if so few are meant"
    return _parse(text, r"([KMGT]I?|)B?", units, "a size: 80GiB or 80GB", 2**20, remedy)


def parse_rate(text: str) -> float:
    """ "3.35TB/s", "990TFLOP/s", "50G" -> per second, in powers of 1000. Less than a million needs a unit.

    Raises:
        Llama4Error: anything else.
    """
    units = {"": 1} | {prefix: 1000**i for i, prefix in enumerate("KMGTP", 1)}
    wanted, remedy = "a rate: 3.35TB/s or 990TFLOP/s", "per second; write {0}G or {0}T"
    return float(_parse(text, r"([KMGTP]?)(?:B/S|FLOPS?|FLOPS?/S)?", units, wanted, 10**6, remedy))


def _parse(text: str, unit: str, sizes: dict[str, int], wanted: str, least: int, remedy: str) -> int:
    match = re.fullmatch(rf"(\d{{1,18}}(?:\.\d+)?)\s*{unit}", text.strip().upper())
    value = round(float(match[1]) * sizes[match[2]]) if match else 0
    if not value:
        raise ArgumentError(f"{text!r} is not {wanted}")
    if value < least and not text.strip()[-1].isalpha():
        raise ArgumentError(f"{text!r} has no unit, so it is {value} {remedy.format(text.strip())}")
    return value
