"""Peak rates of this machine, measured: memory bandwidth and matrix multiplication. And the timing of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama4.weights import memory


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median of several runs, after one that is not counted."""
    run()
    return statistics.median(timed(run) for _ in range(repeats))


@dataclass(frozen=True)
class PeakRates:
    """What a machine reaches at most: bytes read per second, and FLOP/s of a large matrix product."""

    memory: float
    gemm: float

    @staticmethod
    def mean(before: PeakRates, after: PeakRates) -> PeakRates:
        return PeakRates((before.memory + after.memory) / 2, (before.gemm + after.gemm) / 2)


class PeakProbe:
    """Measures the peak rates. Do so around every measurement: on shared machines they drift.

    Memory is read by summing far more numbers than the caches hold, in huge pages where there are any. The product is
    of `size` rows with a square matrix of that size, by the fastest way that torch has for a weight without repacking.
    """

    def __init__(
        self, dtype: torch.dtype, threads: int, device: str = "cpu", *, size: int = 2048, read: int = 300_000_000
    ) -> None:
        self._threads, self._flops, self._bytes = threads, 2 * size**3, read
        x, weight = torch.ones(2, size, size, dtype=dtype, device=device)
        numbers = torch.ones(read // 4, device=device)
        if numbers.device.type == "cpu":
            numbers = memory.in_large_pages(numbers)
        self._sum = lambda: numbers.sum().item()
        self._products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)[0, 0].item()]
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype != torch.float64:
            onednn = torch.ops.mkldnn._linear_pointwise
            self._products.append(lambda: onednn(x, weight, None, "none", [], "")[0, 0].item())

    @torch.inference_mode()
    def measure(self, repeats: int = 3) -> PeakRates:
        """The fastest of a few runs."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            sum_seconds = _fastest(self._sum, 3 * repeats)
            product_seconds = min(_fastest(run, repeats) for run in self._products)
        finally:
            torch.set_num_threads(before)
        return PeakRates(self._bytes / sum_seconds, self._flops / product_seconds)


def _fastest(run: Callable[[], object], repeats: int) -> float:
    run()
    return min(timed(run) for _ in range(repeats))
