"""Published figures, and what is given in their place."""

from __future__ import annotations

import pytest

from llama4.analysis.hardware import ATTENTION, DEVICES, PRODUCTS, READING, overridden, published_rates


@pytest.mark.parametrize("name", DEVICES)
def test_rates_are_parts_of_what_is_published_and_say_whence(name: str) -> None:
    device, rates = DEVICES[name], published_rates(name)
    assert (rates.memory, rates.cache) == (READING.share * device.bandwidth,) * 2
    assert rates.products == pytest.approx(PRODUCTS.share * device.bf16)
    assert rates.attention == ATTENTION.share * device.bf16
    for source in (device.source, READING.source, PRODUCTS.source, ATTENTION.source):
        assert source in rates.source
    assert "datasheet" in device.source


def test_products_partly_in_fp8_take_the_time_of_both_parts() -> None:
    bf16, mixed, fp8 = (published_rates("h100", share).products for share in (0.0, 0.25, 1.0))
    assert 1 / mixed == pytest.approx(0.75 / bf16 + 0.25 / fp8)
    assert fp8 == pytest.approx(2 * bf16, rel=0.01)


def test_what_is_given_counts() -> None:
    rates = published_rates("h100")
    assert overridden(rates, None, None) == rates
    both = overridden(rates, 1e12, 2e14)
    assert (both.memory, both.cache, both.products, both.attention) == (1e12, 1e12, 2e14, 2e14)
    assert both.source == "1,000 GB/s and 200,000 GFLOP/s, as given"
    one = overridden(rates, None, 2e14)
    assert (one.memory, one.products) == (rates.memory, 2e14)
    assert "as given; else H100" in one.source
