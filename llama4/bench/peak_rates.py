"""Peak rates of this machine, measured: memory bandwidth and matrix multiplication. And the timing of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llama4.ops import linear
from llama4.progress import Bar
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
    of `size` rows with a square matrix of that size, by the fastest way that there is for a weight without repacking:
    torch's own, oneDNN's, or this library's kernels, in `dtype` or, where a CPU has no instructions for that, float32.
    """

    def __init__(
        self, dtype: torch.dtype, threads: int, device: str = "cpu", *, size: int = 2048, read: int = 300_000_000
    ) -> None:
        self._threads, self._flops, self._bytes = threads, 2 * size**3, read
        numbers = torch.ones(read // 4, device=device)
        if numbers.device.type == "cpu":
            numbers = memory.in_large_pages(numbers)
        self._sum = lambda: numbers.sum().item()
        dtypes = dict.fromkeys((dtype, torch.float32)) if numbers.is_cpu else [dtype]
        ways = [way for kind in dtypes for way in _products(*torch.ones(2, size, size, dtype=kind, device=device))]
        seconds = {}
        with Bar("measuring what this machine reaches", len(ways), "steps") as bar, self._in_threads():
            for way in ways:
                try:
                    with bar.step(1):
                        seconds[way] = _fastest(way, 1)
                except RuntimeError:  # oneDNN's, of bfloat16 on a CPU without AVX512
                    if not numbers.is_cpu:
                        raise
        self._products = [way for way in seconds if seconds[way] < 1.5 * min(seconds.values())]

    @torch.inference_mode()
    def measure(self, repeats: int = 3) -> PeakRates:
        """The fastest of a few runs."""
        with self._in_threads():
            sum_seconds = _fastest(self._sum, 3 * repeats)
            product_seconds = min(_fastest(run, repeats) for run in self._products)
        return PeakRates(self._bytes / sum_seconds, self._flops / product_seconds)

    @contextmanager
    def _in_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _products(x: Tensor, weight: Tensor) -> list[Callable[[], object]]:
    """The ways to multiply with a weight that is stored as it comes."""

    def run(way: Callable[[Tensor, Tensor], Tensor]) -> object:
        return way(x, weight)[0, 0].item()

    ways: list[Callable[[Tensor, Tensor], Tensor]] = [torch.nn.functional.linear]
    if x.is_cpu:
        ways += [linear.linear, linear.linear_in_out]
    if x.is_cpu and torch.backends.mkldnn.is_available() and x.dtype != torch.float64:
        onednn = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda x, weight: onednn(x, weight, None, "none", [], ""))
    return [partial(run, way) for way in ways]


def _fastest(run: Callable[[], object], repeats: int) -> float:
    run()
    return min(timed(run) for _ in range(repeats))
