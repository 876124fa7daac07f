"""Launches from the cache do what Triton's own do: the same compiled kernel, with the same arguments.

Without a GPU kernels are compiled for one that is not there, by a driver that notes what it is asked to launch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4.bench.device.kernels import Target
from llama4.kernels.triton import common, launch_cache, launch_elementwise, launch_products
from tests.kernels.interpreter import INTERPRETED, needs_the_compiler

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit  # type: ignore[untyped-decorator]
def add(x_N, y_N, out_N, more, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_N + n, mask=n < N) + more
    if y_N is not None:
        total += tl.load(y_N + n, mask=n < N)
    tl.store(out_N + n, total, mask=n < N)


class Driver(Target):
    """Notes launches: of which compiled kernel, and everything it was called with but hooks."""

    def __init__(self) -> None:
        super().__init__(90)
        self.device, self.loaded, self.launched = 0, 0, list[tuple[Any, ...]]()
        self.unloaded = list[str]()
        properties = {"max_shared_mem": 232448}
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            unload_module=self.unloaded.append,
            get_device_properties=lambda device: properties,
        )

    def get_current_device(self) -> int:
        return self.device

    def load_binary(self, *given: Any) -> tuple[Any, ...]:
        self.loaded += 1
        return "module", self.loaded, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launcher(*given: Any) -> None:
            *_, enter, leave = given[:9]
            self.launched.append((source.signature, source.attrs, given[:6], given[9:]))
            for hook in (enter, leave):
                if hook is not None:
                    hook(None)

        return launcher


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    if INTERPRETED:
        pytest.skip("the interpreter has no driver")
    if not triton.__version__.startswith(launch_cache.VERSIONS):
        pytest.skip("this Triton's launches are not kept")
    driver = Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "get_device", lambda tensor: driver.device)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    monkeypatch.setattr(launch_cache, "_kept", {})
    add.device_caches.clear()
    yield driver
    add.device_caches.clear()


def same(driver: Driver, *arguments: Any, grid: tuple[int, ...] = (1,), **sizes: Any) -> bool:
    """Whether a launch was one of those kept; it is checked beside Triton's own."""
    add[grid](*arguments, **sizes, **launch_cache.OPTIONS)
    own = driver.launched[-1]
    kept = len(launch_cache._kept)
    common.launch(add, grid, arguments[0], *arguments, **sizes)
    assert len(driver.launched[-1]) == len(own)
    for found, wanted in zip(driver.launched[-1], own, strict=True):
        assert str(found) == str(wanted)
    assert all(a is b for a, b in zip(driver.launched[-1][3], own[3], strict=True) if isinstance(a, Tensor))
    return len(launch_cache._kept) == kept


@needs_the_compiler
def test_what_a_kernel_is_compiled_for(driver: Driver) -> None:
    """Each launch is that of Triton for the same arguments, whatever was launched before."""
    x = torch.zeros(64)
    assert x.data_ptr() % 16 == 0
    assert not same(driver, x, x, x, 2, 32, BLOCK=16)
    assert same(driver, x, x, x, 2, 32, BLOCK=16)
    cases: list[tuple[Any, ...]] = [
        (x[1:], x, x, 2, 32),  # an address that is no multiple of 16
        (x[4:], x, x[3:], 2, 32),
        *((x, x, x, more, 32) for more in (1, 16, 3, 1 << 40, 1.0, 0.5, True)),
        (x.half(), x, x, 2, 32),
        (x, x.bfloat16(), x, 2, 32),
        (x, None, x, 2, 32),
        (x, x, x, 2, 17),
        (x, x, x, 2, 1),
    ]
    for _ in range(2):
        for arguments in cases:
            same(driver, *arguments, BLOCK=16)
            assert same(driver, *arguments, BLOCK=16)
    assert not same(driver, x, x, x, 2, 32, BLOCK=32)
    assert not same(driver, x, x, x, 2, 32, BLOCK=16, num_warps=8)
    assert same(driver, x, x, x, 2, 32, BLOCK=16, grid=(3, 2, 5))
    loaded = driver.loaded
    driver.device = 1
    assert not same(driver, x, x, x, 2, 32, BLOCK=16)
    assert driver.loaded == loaded + 1


@needs_the_compiler
def test_integers(driver: Driver) -> None:
    """Those for which Triton compiles the same kernel share what is kept, and each is passed on as it is."""
    x = torch.zeros(64)
    kinds = (1,), (2, 17, 1000), (0, 16, 1 << 20), (-5, 3 - (1 << 31)), (1 << 31, 3 << 30), (1 << 40,), (1 << 63,)
    for kind in kinds:
        assert not same(driver, x, x, x, 2, kind[0], BLOCK=16)
        for N in kind:
            assert same(driver, x, x, x, 2, N, BLOCK=16)
            assert driver.launched[-1][3][4] == N
    assert not same(driver, x, x, x, 2, True, BLOCK=16)
    assert same(driver, x, x, x, 2, True, BLOCK=16)
    assert not same(driver, x, x, x, 2, False, BLOCK=16)


@needs_the_compiler
def test_a_constant_among_the_arguments(driver: Driver) -> None:
    """Its kind would be its value: it goes by its name, by which values are looked up."""
    x = torch.zeros(64)
    with pytest.raises(AssertionError, match="constants go by name"):
        same(driver, x, x, x, 2, 32, 16)
    assert not launch_cache._kept


@needs_the_compiler
def test_kernels_of_the_library(driver: Driver) -> None:
    """Twice the same launches, the second time from the cache, and again with rows that are not aligned."""
    common.GPUS[torch.device("cpu")] = common.Gpu(90, 132)
    x, weight = torch.zeros(4, 64), torch.ones(64).bfloat16()
    words, scales, more = torch.zeros(8, 8, dtype=torch.int32), torch.ones(8, 2), torch.zeros(513).bfloat16()[1:]

    def launched() -> list[tuple[Any, ...]]:
        driver.launched.clear()
        launch_elementwise.add_rms_norm(x, x.bfloat16(), weight, 1e-5)
        launch_elementwise.swiglu(x, x)
        launch_products.product("int4", x, words, scales)
        launch_products.product("int4", torch.zeros(40, 64), words, scales)
        launch_elementwise.to_fp8(more.view(8, 64))
        return list(driver.launched)

    first, kept = launched(), len(launch_cache._kept)
    second = launched()
    assert len(launch_cache._kept) == kept == len(first) == 5
    for (signature, attributes, grid, _), (*others, other_grid, _) in zip(first, second, strict=True):
        assert [signature, attributes] == others
        assert grid == other_grid
    del common.GPUS[torch.device("cpu")]


@needs_the_compiler
def test_when_triton_launches(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody watches launches, a kernel asks for it, or Triton is of another version."""
    x = torch.zeros(64)

    def is_kept() -> bool:
        assert same(driver, x, x, x, 2, 32, BLOCK=16)
        return launch_cache.launch(add, (1,), x, (x, x, x, 2, 32), {"BLOCK": 16})

    same(driver, x, x, x, 2, 32, BLOCK=16)
    assert is_kept()
    seen: list[object] = []
    for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hook.add(seen.append)
        assert not is_kept()
        hook.remove(seen.append)
    assert len(seen) == 4
    assert is_kept()
    with monkeypatch.context() as patched:
        patched.setattr(add, "pre_run_hooks", [lambda *given, **sizes: None])
        assert not is_kept()
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "get_device", lambda tensor: 5)  # not the current device
        assert not launch_cache.launch(add, (1,), x, (x, x, x, 2, 32), {"BLOCK": 16})
    with monkeypatch.context() as patched:
        patched.setattr(launch_cache, "enabled", False)
        assert not is_kept()
    monkeypatch.setattr(launch_cache, "_triton", lambda: None)
    assert not is_kept()


@needs_the_compiler
def test_what_is_kept_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_cache, "MAX_KEPT", 3)
    x = torch.zeros(64)
    for more in range(10):
        same(driver, x, x, x, more / 2, 32, BLOCK=16)
        assert same(driver, x, x, x, more / 2, 32, BLOCK=16)
        assert len(launch_cache._kept) <= 3


@needs_the_compiler
def test_what_is_kept_stays_loaded(driver: Driver) -> None:
    """Though Triton forgets it: newer versions unload what nobody has."""
    x = torch.zeros(64)
    same(driver, x, x, x, 2, 32, BLOCK=16)
    add.device_caches.clear()
    gc.collect()
    assert launch_cache.launch(add, (1,), x, (x, x, x, 2, 32), {"BLOCK": 16})
    assert not driver.unloaded


@pytest.mark.cuda
def test_results_on_a_gpu() -> None:
    """The same from the cache as from Triton, with addresses that are aligned and not, on the current stream, and in a
    graph."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    numbers = torch.randn(3, 4096, device="cuda")
    out = torch.zeros(4096, device="cuda")

    def check(x: Tensor, y: Tensor | None, more: float) -> None:
        N = len(x)
        truth = x + more if y is None else x + more + y
        for _ in range(3):
            out.zero_()
            common.launch(add, (-(-N // 256),), x, x, y, out, more, N, BLOCK=256)
            assert torch.allclose(out[:N], truth)
            assert not out[N:].any()

    def check_all() -> None:
        for begin in (0, 1, 4):
            for more in (1, 2, 16, 0.5, 1.0):
                check(numbers[0, begin:4000], numbers[1, begin:4000], more)
                check(numbers[0, begin:4000], None, more)

    check_all()
    with torch.cuda.stream(torch.cuda.Stream()):
        check_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        common.launch(add, (16,), numbers[0], numbers[0], numbers[1], out, 2, 4096, BLOCK=256)
    numbers += 1
    graph.replay()
    assert torch.allclose(out, numbers[0] + 2 + numbers[1])
