"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter.

What the interpreter cannot see, that a kernel can be compiled for a GPU, `test_compiles` does with triton's own
compiler, which needs no GPU either.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4.kernels.triton import common, launch_elementwise, launch_products, support
from llama4.ops import quantized_gpu
from llama4.ops.fp8 import to_fp8
from llama4.quantization import int4
from llama4.quantization.fp8 import Fp8
from llama4.quantization.int4 import Int4
from llama4.quantization.int8 import Int8
from llama4.quantization.modules import QuantizedExperts
from llama4.quantization.weight import WeightFormat
from tests.kernels.interpreter import (
    DEVICE,
    INTERPRETED,
    compile_only,
    needs_the_compiler,
    needs_the_interpreter,
    on_a_device,
    run_again,
)
from tests.quantization.test_weight import name_of, packed

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("bfloat16_in_the_interpreter", "launches_in_the_interpreter")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = {
    "one row": [0, 0, 1, 0],
    "few rows": [3, 0, 1, 0, 2],
    "few rows, one expert": [0, 0, 0, 5],
    "few rows, one matrix": [4],
    "few rows, more of experts": [6, 0, 5, 3],
    "some rows": [0, 15, 1, 2],
    "many rows": [40, 0, 17, 33, 1],
    "many rows, one expert": [0, 0, 0, 150],
    "many rows, one matrix": [70],
}
INPUTS = 192
"""Three blocks, since no larger power of two than 64 divides them."""


@pytest.fixture
def nothing_left_over() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_matrices(kind: str, experts: int, outputs: int, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> values and scales as a checkpoint has them, and what they stand for, in float64."""
    generator = torch.Generator().manual_seed(0)
    groups = INPUTS // group if group else 1
    scales = (torch.rand(experts, outputs, groups, generator=generator) + 0.5).bfloat16()
    shape = experts, outputs, INPUTS
    if kind == "fp8":
        values = torch.arange(experts * outputs * INPUTS).view(shape).to(torch.uint8)
        values[values & 127 == 127] = 0  # not numbers; all others occur
        numbers = values.view(torch.float8_e4m3fn).double()
    else:
        low, high = (-8, 8) if kind == "int4" else (-128, 128)
        values = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
        numbers = values.double()
    matrices = (numbers.unflatten(-1, (groups, -1)) * scales.double()[..., None]).flatten(-2)
    return int4.pack(values) if kind == "int4" else values, scales, matrices


def check(kind: str, dtype: torch.dtype, counts: list[int], group: int | None) -> None:
    counts_there = torch.tensor(counts, device=DEVICE) if len(counts) > 1 else None
    outputs = 20 if launch_products.are_few(sum(counts), counts_there) else 140  # ends within a block
    values, scales, matrices = random_matrices(kind, len(counts), outputs, group)
    x = torch.randn(sum(counts), INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    x_scales = None
    if kind == "fp8":
        x_values, x_scales = to_fp8(x, torch.float32)
        exact, x, x_scales = x_values.double() * x_scales.double(), x_values.view(torch.uint8), x_scales[:, 0]
    else:
        exact = x.double()
    truth = torch.cat([rows @ matrix.mT for rows, matrix in zip(exact.split(counts), matrices, strict=True)])
    x, values, scales = x.to(DEVICE), values.to(DEVICE), scales.to(DEVICE)
    x_scales = None if x_scales is None else x_scales.to(DEVICE)
    y = launch_products.product(kind, x, values, scales, counts_there, x_scales_R=x_scales, dtype=torch.float32)
    error = (y.cpu().double() - truth).abs().max() / truth.abs().max()
    assert error < 1e-5, "values and inputs are exact, and sums of hundreds of products are rounded to float32"


@on_a_device
@pytest.mark.usefixtures("nothing_left_over")
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", launch_products.KINDS)
def test_product(kind: str, counts: str) -> None:
    check(kind, torch.bfloat16, COUNTS[counts], 64 if kind == "int4" else None)


@on_a_device
@pytest.mark.parametrize("counts", ["one row", "some rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", launch_products.KINDS)
def test_other_dtypes(kind: str, dtype: torch.dtype, counts: str) -> None:
    check(kind, dtype, COUNTS[counts], 32 if kind == "int4" else None)


@on_a_device
@pytest.mark.parametrize("counts", ["few rows", "some rows"])
@pytest.mark.parametrize("group", [96, None])
def test_groups(group: int | None, counts: str) -> None:
    """That are no power of two, and the whole row."""
    check("int4", torch.bfloat16, COUNTS[counts], group)


@on_a_device
@pytest.mark.parametrize("kind", launch_products.KINDS)
def test_whole_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a length of which no thread has less than others."""
    monkeypatch.setitem(globals(), "INPUTS", 1024)
    check(kind, torch.bfloat16, [0, 1], 128 if kind == "int4" else None)


@on_a_device
@pytest.mark.usefixtures("nothing_left_over")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", launch_products.KINDS)
def test_products(kind: str, rows: int) -> None:
    """With two and three matrices at once, bit for bit those with each of them."""
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x_scales = None
    if kind == "fp8":
        values, scales = to_fp8(x, torch.float32)
        x, x_scales = values.view(torch.uint8), scales[:, 0]
    matrices, alone = [], []
    for outputs in (20, 8, 12):
        values, scales, _ = random_matrices(kind, 1, outputs, 32 if kind == "int4" else None)
        matrices.append((values[0].to(DEVICE), scales[0].to(DEVICE)))
        alone.append(launch_products.product(kind, x, *matrices[-1], x_scales_R=x_scales, dtype=torch.float32))
        y = launch_products.products(kind, x, matrices, x_scales_R=x_scales, dtype=torch.float32)
        assert torch.equal(y, torch.cat(alone, dim=1))


@on_a_device
@pytest.mark.usefixtures("nothing_left_over")
@pytest.mark.parametrize("rows", [7, 30])
def test_a_program_writes_rows_of_its_expert_alone(rows: int) -> None:
    """Others would be right by chance, where their own program comes later: here the last rows have none."""
    values, scales, _ = random_matrices("int8", 3, 20, None)
    x, counts = torch.ones(rows, INPUTS, device=DEVICE), torch.tensor([2, 0, 3], device=DEVICE)
    y = launch_products.product("int8", x, values.to(DEVICE), scales.to(DEVICE), counts)
    assert y[:5].isfinite().all()
    assert y[5:].isnan().all()


@on_a_device
@pytest.mark.usefixtures("nothing_left_over")
@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int4", 96), ("int8", None)])
def test_unpack(kind: str, group: int | None) -> None:
    """To the bit, matrices and some of their outputs: products with scales are exact in float32, and rounded once."""
    values, scales, matrices = random_matrices(kind, 3, 52, group)
    values, scales, truth = values.to(DEVICE), scales.to(DEVICE), matrices.float().bfloat16()
    assert torch.equal(launch_products.unpack(kind, values, scales).cpu(), truth)
    assert torch.equal(launch_products.unpack(kind, values[:, 16:48], scales[:, 16:48]).cpu(), truth[:, 16:48])
    assert torch.equal(launch_products.unpack(kind, values[1], scales[1]).cpu(), truth[1])


@on_a_device
@pytest.mark.parametrize("at_once", [1 << 30, 1])
@pytest.mark.parametrize("counts", ["many rows", "many rows, one matrix"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_unpacked_linear(kind: str, counts: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All outputs at once, and parts of them."""
    monkeypatch.setattr(quantized_gpu, "MAX_UNPACKED", at_once)
    rows = COUNTS[counts]
    values, scales, matrices = random_matrices(kind, len(rows), 520, 64 if kind == "int4" else None)
    x = torch.randn(sum(rows), INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = torch.cat([part @ matrix.mT for part, matrix in zip(x.double().split(rows), matrices, strict=True)])
    x, values, scales, counts_E = x.to(DEVICE), values.to(DEVICE), scales.to(DEVICE), torch.tensor(rows, device=DEVICE)
    if len(rows) > 1:
        y = quantized_gpu.unpacked_linear(kind, x, values, scales, counts_E)
    else:
        y = quantized_gpu.unpacked_linear(kind, x, values[0], scales[0], None)
    error = (y.cpu().double() - truth).norm() / truth.norm()
    assert y.shape == truth.shape
    assert error < 1e-2, "weights and results are rounded to bfloat16"


def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, whose tensors are on the CPU."""
    if INTERPRETED:
        monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
        monkeypatch.setattr(Tensor, "is_cuda", True)


@on_a_device
@pytest.mark.parametrize("format", [Int4(32), Int8()], ids=name_of)
def test_gradients_of_inputs(format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """By matrices that a kernel unpacks, some outputs at a time."""
    weight = packed(torch.randn(3, 48, 64, generator=torch.Generator().manual_seed(0)), format)
    gradient = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = gradient.double() @ format.rows_of(weight, 1, torch.bfloat16)(slice(0, 48)).double()
    unpack, calls = launch_products.unpack, 0

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return unpack(*args)

    monkeypatch.setattr(launch_products, "unpack", counted)
    monkeypatch.setattr(type(format), "rows_on_gpu", 32)
    as_if_on_a_gpu(monkeypatch)
    given = format.input_gradient(weight.to(DEVICE), gradient.to(DEVICE), 1).cpu()
    assert (given.double() - truth).norm() < 5e-3 * truth.norm()
    assert calls == 2


@on_a_device
@pytest.mark.parametrize("rows", [0, 3, 20])
@pytest.mark.parametrize("format", [Int4(32), Int8(), Fp8()], ids=name_of)
def test_modules(format: WeightFormat, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed Linear and packed experts give by the kernels what they give without, to the precision of the dtype."""
    experts = QuantizedExperts()
    experts.gate_up_proj = packed(torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0)), format)
    experts.down_proj = packed(torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1)), format)
    linear = packed(torch.randn(24, 32, generator=torch.Generator().manual_seed(2)), format)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(3)) / 10
    counts = torch.tensor([rows - rows // 3, 0, rows // 3])
    truths = linear(x), experts(x, counts)

    product, calls = launch_products.product, 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return product(*args, **kwargs)

    as_if_on_a_gpu(monkeypatch)
    monkeypatch.setattr(launch_products, "product", counted)
    linear, experts = linear.to(DEVICE), experts.to(DEVICE)
    x, counts = x.to(DEVICE), counts.to(DEVICE)
    for y, truth in zip((linear(x), experts(x, counts)), truths, strict=True):
        assert y.shape == truth.shape
        assert y.dtype == torch.float32
        assert torch.allclose(y.cpu(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item() if rows else 0)
    assert calls == 3


@on_a_device
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("format", [Int8(), Fp8()], ids=name_of)
def test_experts_whose_width_no_kernel_takes(format: WeightFormat, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second product, while the first would do."""
    experts = QuantizedExperts()
    experts.gate_up_proj = packed(torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0)), format)
    experts.down_proj = packed(torch.randn(3, 32, 24, generator=torch.Generator().manual_seed(1)), format)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(3)) / 10
    counts = torch.tensor([rows - rows // 3, 0, rows // 3])
    truth = experts(x, counts)
    as_if_on_a_gpu(monkeypatch)
    experts, x, counts = experts.to(DEVICE), x.to(DEVICE), counts.to(DEVICE)
    reasons = [quantized_gpu.unsupported_reason(format.kind, x, inputs, format.group_size) for inputs in (32, 24)]
    assert reasons == [None, "the inputs of a scale are no multiple of 16"]
    assert torch.allclose(experts(x, counts).cpu(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@on_a_device
@pytest.mark.parametrize("rows", [3, 20])
def test_a_row_with_nan(rows: int) -> None:
    """In e4m3 it gives nothing else, and other rows are as they were."""
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[1, 5] = torch.nan
    x_values, x_scales = launch_elementwise.to_fp8(x)
    values, scales = (part[0].to(DEVICE) for part in random_matrices("fp8", 1, 20, None)[:2])
    x_values, x_scales_R = x_values.view(torch.uint8), x_scales[:, 0]
    y = launch_products.product("fp8", x_values, values, scales, x_scales_R=x_scales_R, dtype=torch.float32)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@on_a_device
def test_what_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the kernels are used; it goes well here."""
    if INTERPRETED:
        monkeypatch.setitem(common.GPUS, torch.device("cpu"), common.Gpu(80, 16))
    assert support._fault(torch.device(DEVICE)) is None


@needs_the_interpreter
def test_in_the_interpreter() -> None:
    run_again(__file__)


@needs_the_compiler
@pytest.mark.parametrize(("kind", "capability"), [("int4", 80), ("int4", 90), ("int8", 90), ("fp8", 80)])
def test_compiles(kind: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an A100 and an H100, at Scout's sizes."""
    compiled = compile_only(capability, monkeypatch, tmp_path)
    experts, outputs, inputs = 16, 16384, 5120
    values = torch.empty(experts, outputs, inputs, dtype=torch.int8 if kind == "int8" else torch.uint8, device="meta")
    if kind == "int4":
        values = values[..., : inputs // 2].contiguous().view(torch.int32)
    scales = torch.empty(experts, outputs, inputs // 128 if kind == "int4" else 1, dtype=torch.bfloat16, device="meta")
    counts = torch.empty(experts, dtype=torch.int64, device="meta")
    for rows in (4, 2048):
        x = torch.empty(rows, inputs, dtype=torch.uint8 if kind == "fp8" else torch.bfloat16, device="meta")
        x_scales = torch.empty(rows, device="meta") if kind == "fp8" else None
        launch_products.product(kind, x, values, scales, counts, x_scales_R=x_scales, dtype=torch.bfloat16)
    x, x_scales = x[:1], None if x_scales is None else x_scales[:1]
    launch_products.products(kind, x, [(values[0], scales[0])] * 3, x_scales_R=x_scales, dtype=torch.bfloat16)
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= {80: 99, 90: 227}[capability] * 1024, "what the smallest of those GPUs has"
    assert [kernel.metadata.name for kernel in compiled] == ["gemv", "grouped_gemm", "gemv"]


@needs_the_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_unpack_compiles(kind: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thread stores 16 bytes at a time, or of int8 8."""
    compiled = compile_only(capability, monkeypatch, tmp_path)
    in_row, dtype = (5120, torch.int8) if kind == "int8" else (640, torch.int32)
    scales = torch.empty(16, 16384, 1 if kind == "int8" else 40, dtype=torch.bfloat16, device="meta")
    launch_products.unpack(kind, torch.empty(16, 16384, in_row, dtype=dtype, device="meta"), scales)
    assert f"st.global.v{2 if kind == 'int8' else 4}.b32" in compiled[0].asm["ptx"]
