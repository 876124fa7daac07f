"""When the kernels for GPUs are taken. What they compute is in test_triton."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llama4.cache.formats import QUANTIZED, CacheFormat, Unquantized
from llama4.config import TextConfig
from llama4.kernels.triton import common, launch_attention, launch_cache, launch_elementwise, launch_products, support
from llama4.model.experts import GroupedExperts
from llama4.ops import attention_gpu, fp8, norm, quantized_gpu
from llama4.quantization.fp8 import Fp8

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    caches = support.unsupported_reason, support._failure  # a test may replace them
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_not_on_a_cpu() -> None:
    assert support.unsupported_reason(CPU, torch.bfloat16) == "they are for GPUs, not for cpu"
    assert quantized_gpu.unsupported_reason("int4", torch.zeros(1, 64), 64, 32) == "the rows are not on a GPU"


def test_where_they_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_probes", lambda device: ())
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    monkeypatch.setitem(common.GPUS, CUDA, common.Gpu(80, 108))

    def reason(dtype: torch.dtype = torch.bfloat16) -> str | None:
        support.unsupported_reason.cache_clear()
        support._failure.cache_clear()
        return support.unsupported_reason(CUDA, dtype)

    assert reason() is None
    assert reason(torch.float64) == "they do not take torch.float64"
    monkeypatch.setitem(common.GPUS, CUDA, common.Gpu(75, 40))
    assert reason() == "its compute capability is 7.5; they need 8.0"
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert reason() == "the package triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reason() == "they are for NVIDIA's GPUs, and torch is built for ROCm"
    monkeypatch.setenv(support.SWITCH, "off")
    assert reason() == "LLAMA4_GPU_KERNELS is off"


TRIED = {
    "a product": (launch_products, "product", 16),
    "a norm": (launch_elementwise, "rms_norm", 2),
    "attention": (launch_attention, "attend", 2),
}
"""Launches, and what all numbers of their results should be."""


def constant(number: float, *given: object) -> Tensor:
    return torch.full((1, 4), float(number))


def test_nothing_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(common.GPUS, CPU, common.Gpu(80, 108))
    for module, name, right in TRIED.values():
        monkeypatch.setattr(module, name, partial(constant, right))
    assert support._failure(CPU) is None
    assert not caplog.records


@pytest.mark.parametrize("broken", TRIED)
def test_what_fails_is_told_once(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether a launch fails or gives something wrong."""
    monkeypatch.setitem(common.GPUS, CPU, common.Gpu(80, 108))
    for module, name, right in TRIED.values():
        monkeypatch.setattr(module, name, partial(constant, right))

    def reason(launch: Callable[..., Tensor]) -> str | None:
        monkeypatch.setattr(*TRIED[broken][:2], launch)
        support._failure.cache_clear()
        assert support._failure(CPU) == support._failure(CPU)
        return support._failure(CPU)

    def failing(*given: object) -> Tensor:
        raise RuntimeError("no compiler\nat line 7")

    right = TRIED[broken][2]
    assert reason(failing) == "no compiler"
    assert reason(partial(constant, 15)) == f"{broken} gave 15.0 instead of {right}"
    assert reason(partial(constant, math.nan)) == f"{broken} gave nan instead of {right}"
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert warnings[0] == "the Triton kernels do not run on cpu (no compiler); torch's own operations are slower"


@pytest.mark.parametrize("fails_again", [False, True])
def test_kept_launches_are_tried(
    fails_again: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All is launched a second time, from what was kept; where that fails, Triton goes on to launch."""
    monkeypatch.setitem(common.GPUS, CPU, common.Gpu(80, 108))
    monkeypatch.setattr(launch_cache, "enabled", True)
    for module, name, right in TRIED.values():
        monkeypatch.setattr(module, name, partial(constant, right))
    norms: list[Tensor] = []

    def rms_norm(*given: object) -> Tensor:
        if norms and fails_again:
            raise TypeError("function takes exactly 5 arguments")
        norms.append(constant(2))
        return norms[-1]

    monkeypatch.setattr(launch_elementwise, "rms_norm", rms_norm)
    assert support._failure(CPU) is None
    assert launch_cache.enabled is not fails_again
    assert len(norms) == (1 if fails_again else 2)
    warnings = ["kept launches fail on cpu (function takes exactly 5 arguments); Triton's own take longer"]
    assert [record.message for record in caplog.records] == warnings * fails_again


@pytest.mark.parametrize("kind", launch_products.KINDS)
@pytest.mark.parametrize(("rows", "experts"), [(1, 1), (8, 16), (9, 16), (33, 4), (300, 16), (2048, 1), (2048, 128)])
def test_a_grid_holds_the_worst_case(kind: str, rows: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However rows are spread, there is a program for each tile of each expert; and blocks divide what they must."""
    launches = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *tensors, **sizes: launches.append((grid, sizes))

    quantized = pytest.importorskip("llama4.kernels.triton.quantized")
    monkeypatch.setattr(quantized, "gemv", Kernel())
    monkeypatch.setattr(quantized, "grouped_gemm", Kernel())
    monkeypatch.setitem(common.GPUS, CPU, common.Gpu(90, 132))
    group = 32 if kind == "int4" else 192
    x = torch.empty(rows, 192, dtype=torch.uint8 if kind == "fp8" else torch.bfloat16)
    values = torch.empty(experts, 100, 192, dtype=torch.int8).view(torch.int8 if kind == "int8" else torch.uint8)
    values = values[..., :96].contiguous().view(torch.int32) if kind == "int4" else values
    scales, counts = torch.empty(experts, 100, 192 // group), torch.zeros(experts, dtype=torch.int64)
    launch_products.product(kind, x, values, scales, counts)
    grid, sizes = launches[0]
    check_grid(math.prod(grid), sizes["BLOCK_R"], -(-100 // sizes["BLOCK_O"]), rows, experts)
    if "BLOCK_I" in sizes:
        assert 192 % sizes["BLOCK_I"] == group % sizes["BLOCK_I"] == 0


@pytest.mark.parametrize(("rows", "experts"), [(1, 1), (8, 16), (33, 4), (300, 16), (2048, 1), (2048, 16), (2048, 128)])
def test_the_grid_of_experts_in_bfloat16(rows: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *tensors, **sizes: launches.append((grid, sizes))

    monkeypatch.setattr(pytest.importorskip("llama4.kernels.triton.grouped"), "grouped_mm", Kernel())
    x, weights = torch.empty(rows, 64, dtype=torch.bfloat16), torch.empty(experts, 64, 520, dtype=torch.bfloat16)
    launch_products.grouped_mm(x, torch.zeros(experts, dtype=torch.int64), weights)
    grid, sizes = launches[0]
    check_grid(math.prod(grid), sizes["BLOCK_R"] + sizes["MORE_R"], -(-520 // sizes["BLOCK_O"]), rows, experts)


def check_grid(programs: int, at_once: int, blocks: int, rows: int, experts: int) -> None:
    """Whether there is a program for each of so many blocks of outputs of each tile, and none more than at worst."""
    tiles = programs // blocks
    assert programs == tiles * blocks
    generator = torch.Generator().manual_seed(0)
    for used in range(1, min(experts, rows) + 1):
        counts = torch.ones(used, dtype=torch.int64)
        extra = torch.randint(0, used, (rows - used,), generator=generator)
        counts += torch.bincount(extra, minlength=used)
        assert tiles >= (-(-counts // at_once)).sum()
    worst = torch.ones(min(experts, rows), dtype=torch.int64)
    worst[0] += rows - len(worst)
    assert tiles == (-(-worst // at_once)).sum() or at_once == 1


def test_when_a_matrix_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows enough of each matrix, by torch's products, which check what they get; and without waiting for counts,
    which are not there."""
    monkeypatch.setattr(launch_products, "unpack", lambda kind, values, scale: scale.new_empty(*scale.shape[:-1], 64))
    monkeypatch.setattr(launch_products, "product", lambda kind, x, *rest: x.new_empty(len(x), 0))

    def outputs(rows: int, dtype: torch.dtype = torch.bfloat16, capability: int = 90, of: int = 48) -> list[int]:
        monkeypatch.setitem(common.GPUS, torch.device("cuda", 0), common.Gpu(capability, 132))
        with FakeTensorMode(), torch.device("cuda", 0):
            x, counts = torch.empty(rows, 64, dtype=dtype), torch.empty(4, dtype=torch.int64)
            values, scale = torch.empty(4, of, 8, dtype=torch.int32), torch.empty(4, of, 2, dtype=torch.bfloat16)
            grouped = quantized_gpu.linear("int4", x, values, scale, counts)
            alone = quantized_gpu.linear("int4", x[: rows // 4], values[0], scale[0])
            assert grouped.dtype == alone.dtype == dtype
            return [grouped.shape[1], alone.shape[1]]

    enough = 4 * quantized_gpu.MIN_UNPACKED_ROWS
    assert outputs(enough) == [48, 48]
    monkeypatch.setattr(quantized_gpu, "MAX_UNPACKED", 1)
    assert outputs(enough, of=520) == [520, 520], "part by part"
    assert outputs(enough - 1) == [0, 0]
    assert outputs(enough, torch.float16) == [0, 0]
    assert outputs(enough, capability=80) == outputs(enough, capability=120) == [0, 0]
    assert outputs(enough, of=44) == [0, 0]
    assert quantized_gpu.unpacking_unsupported_reason("fp8", torch.empty(1), torch.empty(1, 1), None)


def test_torchs_grouped_products_get_what_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts, dtypes and sizes, which torch checks for tensors on a GPU also where there is none."""
    monkeypatch.setattr(fp8, "has_fp8_matmul", lambda device, grouped=False: True)
    with FakeTensorMode(), torch.device("cuda"):
        x, counts = torch.randn(20, 32, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
        values, scale = (torch.empty(spec.shape, dtype=spec.dtype) for spec in Fp8().part_specs((4, 48, 32)).values())
        y = quantized_gpu.linear("fp8", x, values, scale, counts)
        assert (y.shape, y.dtype, y.device.type) == ((20, 48), torch.bfloat16, "cuda")
        assert quantized_gpu.unsupported_reason("fp8", x, 32, 16) == "there is more than one scale per output"
        rows = fp8.to_fp8(x, torch.float32)
        y = fp8.scaled_mm(rows, torch.empty(48, 32, dtype=torch.uint8), torch.ones(48, 1), torch.bfloat16)
        assert (y.shape, y.dtype) == ((20, 48), torch.bfloat16)
        experts = GroupedExperts(TextConfig(hidden_size=32, intermediate_size=48, num_local_experts=4))
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(torch.empty_like(parameter, dtype=torch.bfloat16)))
        assert experts(x, counts).shape == (20, 32)


def test_a_sum_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer what is added may need a gradient where what it is added to does not."""
    monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
    launched = []

    def launch(x: Tensor, *given: object) -> tuple[Tensor, Tensor]:
        launched.append(x)
        return x, x

    monkeypatch.setattr(launch_elementwise, "add_rms_norm", launch)
    with FakeTensorMode(), torch.device("cuda"):
        x, delta, weight = torch.zeros(2, 8), torch.zeros(2, 8), torch.ones(8)
        norm.add_rms_norm(x, delta, weight, 1e-5)
        assert len(launched) == 1
        total, normed = norm.add_rms_norm(x, delta.requires_grad_(), weight, 1e-5)
        assert total.requires_grad and normed.requires_grad
        with torch.no_grad():
            norm.add_rms_norm(x, delta, weight, 1e-5)
    assert len(launched) == 2


def test_blocks_that_no_kernel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)

    def reason(format: CacheFormat, device: torch.device, blocks: torch.device, head_dim: int = 128) -> str | None:
        return attention_gpu.unsupported_reason(torch.bfloat16, head_dim, format, device, blocks)

    half = Unquantized(torch.float16)
    for format in (half, *QUANTIZED.values()):
        assert reason(format, here, here) is reason(format, here, CUDA) is None
    assert reason(half, CPU, CPU) == "the model is not on a GPU"
    assert reason(half, here, CPU) == "the cache's blocks are on cpu"
    assert reason(half, here, there) == "the cache's blocks are on cuda:1"
    assert reason(Unquantized(torch.float64), here, here) == "there are no kernels for a cache in float64"
    assert reason(half, here, here, 512) == "heads are larger than 256"
