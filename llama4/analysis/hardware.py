"""What devices reach: published peaks, each with its source, and the share of them that programs reach."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """The share of a published peak that a program reached, and which program."""

    share: float
    source: str


READING = Efficiency(0.72, "gpt-fast's decoding on an A100: PyTorch blog, GPT, Fast, 2023")
PRODUCTS = Efficiency(0.40, "Llama 3's training on H100s, 38 to 43%: The Llama 3 Herd of Models, 2024, section 3.3")
ATTENTION = Efficiency(0.35, "FlashAttention-2, which torch calls, on an H100: FlashAttention-3, 2024, abstract")


@dataclass(frozen=True)
class Device:
    """A published device: bytes of memory, bytes per second, and FLOPs per second without sparsity."""

    name: str
    memory: int
    bandwidth: float
    bf16: float
    fp8: float
    source: str


DEVICES = {
    "h100": Device("H100 SXM", 80 << 30, 3.35e12, 989e12, 1979e12, "NVIDIA H100 datasheet; dense is half of sparse"),
    "h200": Device("H200 SXM", 141 * 10**9, 4.8e12, 989e12, 1979e12, "NVIDIA H200 datasheet; dense is half of sparse"),
    "b200": Device(
        "B200", 180 * 10**9, 8e12, 2250e12, 4500e12, "NVIDIA DGX B200 datasheet, an eighth; dense is half of sparse"
    ),
}


@dataclass(frozen=True)
class Rates:
    """What one device reaches.

    Attributes:
        memory: bytes of weights read per second while decoding.
        cache: bytes of keys and values read per second while decoding.
        products: FLOPs per second of matrix products while reading a prompt.
        attention: FLOPs per second of attention while reading a prompt.
        source: where these figures are from.
    """

    memory: float
    cache: float
    products: float
    attention: float
    source: str


def published_rates(name: str, fp8_share: float = 0.0) -> Rates:
    """What a device of `DEVICES` is expected to reach.

    Args:
        name: a key of `DEVICES`.
        fp8_share: share of the FLOPs of matrix products that is done in fp8; the rest is done in bf16.
    """
    device = DEVICES[name]
    return Rates(
        memory=READING.share * device.bandwidth,
        cache=READING.share * device.bandwidth,
        products=PRODUCTS.share / ((1 - fp8_share) / device.bf16 + fp8_share / device.fp8),
        attention=ATTENTION.share * device.bf16,
        source=f"{device.name}, {device.bandwidth / 1e12:g} TB/s and {device.bf16 / 1e12:g} TFLOP/s in bf16, "
        f"{device.fp8 / 1e12:g} in fp8 ({device.source}); of which {READING.share:.0%} are reached in reading "
        f"({READING.source}), {PRODUCTS.share:.0%} in products ({PRODUCTS.source}), {ATTENTION.share:.0%} in attention "
        f"({ATTENTION.source})",
    )


def overridden(rates: Rates, memory: float | None, products: float | None) -> Rates:
    """The rates with what the user gave in their place: `memory` for weights and cache, `products` for products and
    attention."""
    given = [f"{rate / 1e9:,.10g} {unit}" for rate, unit in ((memory, "GB/s"), (products, "GFLOP/s")) if rate]
    if not given:
        return rates
    source = f"{' and '.join(given)}, as given" + ("" if len(given) == 2 else f"; else {rates.source}")
    return Rates(
        memory or rates.memory, memory or rates.cache, products or rates.products, products or rates.attention, source
    )
