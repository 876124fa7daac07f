"""The Triton kernel for experts in bfloat16 against float64: on a GPU where there is one, else in Triton's
interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4.config import TextConfig
from llama4.kernels.triton import common, launch_products, support
from llama4.model.experts import GroupedExperts
from llama4.ops import experts
from tests.kernels.interpreter import (
    DEVICE,
    INTERPRETED,
    compile_only,
    needs_the_compiler,
    needs_the_interpreter,
    on_a_device,
    run_again,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("bfloat16_in_the_interpreter")

COUNTS = {
    "one row": [0, 0, 1, 0],
    "some rows": [0, 15, 1, 2],
    "to the end of a tile": [64, 128, 192, 256],
    "beyond it by one": [0, 65, 129, 193],
    "one expert": [0, 0, 0, 250],
    "one matrix": [70],
}
BLOCKS = {"64": 10, "128": 64, "128 and 64": 128}
"""Rows of an expert, on average, for which tiles have so many."""


@pytest.fixture
def nothing_left_over() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def of_blocks(mean: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if experts had so many rows on average."""
    blocks = launch_products._grouped_blocks(mean, 1)
    monkeypatch.setattr(launch_products, "_grouped_blocks", lambda rows, E: blocks)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@on_a_device
@pytest.mark.usefixtures("nothing_left_over")
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_mm(counts: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_blocks(BLOCKS[blocks], monkeypatch)
    rows, inputs, outputs = COUNTS[counts], 128, 264  # ends within a block
    x, weights = drawn(sum(rows), inputs, seed=0), drawn(len(rows), inputs, outputs, seed=1)
    truth = torch.cat([part @ weight for part, weight in zip(x.double().split(rows), weights.double(), strict=True)])
    y = launch_products.grouped_mm(x.to(DEVICE), torch.tensor(rows, device=DEVICE), weights.to(DEVICE))
    assert y.dtype == torch.bfloat16
    error = (y.cpu().double() - truth).abs() / truth.abs().clamp(min=1e-2)
    assert error.max() < 2**-8, "sums are rounded to bfloat16"


@on_a_device
@pytest.mark.usefixtures("nothing_left_over")
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_program_writes_rows_of_its_expert_alone(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows are of none."""
    of_blocks(BLOCKS[blocks], monkeypatch)
    x, weights = torch.ones(30, 64).bfloat16().to(DEVICE), torch.ones(3, 64, 8).bfloat16().to(DEVICE)
    y = launch_products.grouped_mm(x, torch.tensor([2, 0, 3], device=DEVICE), weights)
    assert (y[:5] == 64).all()
    assert y[5:].isnan().all()


def test_no_rows() -> None:
    y = launch_products.grouped_mm(drawn(0, 64, seed=0), torch.zeros(2, dtype=torch.int64), drawn(2, 64, 8, seed=1))
    assert y.shape == (0, 8)


@pytest.fixture
def grouped_mm_is_not_tried_yet() -> Iterator[None]:
    support.grouped_mm_unsupported_reason.cache_clear()
    yield
    support.grouped_mm_unsupported_reason.cache_clear()


@pytest.mark.usefixtures("grouped_mm_is_not_tried_yet")
def test_when_it_is_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where it runs, and a first small product is right."""
    monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)

    def gives(result: int) -> None:
        def grouped_mm(x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
            if not result:
                raise RuntimeError("no descriptors here\nand more")
            return torch.full((len(x), weights.shape[2]), result)

        monkeypatch.setattr(launch_products, "grouped_mm", grouped_mm)
        support.grouped_mm_unsupported_reason.cache_clear()

    gives(64)
    x, weights = drawn(16, 64, seed=0), drawn(2, 64, 16, seed=1)
    assert experts.gpu_unsupported_reason(x, weights) == "a tensor is not on a GPU"
    monkeypatch.setattr(Tensor, "is_cuda", True)
    for capability, reason in ((80, "it is for Hopper"), (100, "it is for Hopper"), (90, None)):
        monkeypatch.setitem(common.GPUS, x.device, common.Gpu(capability, 132))
        support.grouped_mm_unsupported_reason.cache_clear()
        assert experts.gpu_unsupported_reason(x, weights) == reason
    assert not caplog.messages
    for result, reason in ((63, "a product gave 63 instead of 64"), (0, "no descriptors here")):
        gives(result)
        assert experts.gpu_unsupported_reason(x, weights) == reason
        assert reason in caplog.messages[-1]
    assert experts.gpu_unsupported_reason(x.half(), weights.half()) == "rows or matrices are not bfloat16"
    assert experts.gpu_unsupported_reason(x, weights.mT.contiguous().mT) == "the matrices are not contiguous"
    odd = "the inputs are no multiple of 64, or the outputs none of 8"
    assert experts.gpu_unsupported_reason(x, weights[:, :32]) == odd
    assert experts.gpu_unsupported_reason(x, weights[..., :12]) == odd
    assert experts.gpu_unsupported_reason(x, weights.requires_grad_()) == "a tensor needs a gradient"


@on_a_device
def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend gives with the kernel what it gives without."""
    module = GroupedExperts(TextConfig(hidden_size=64, intermediate_size=128, num_local_experts=4)).requires_grad_(
        False
    )
    for parameter in module.parameters():
        parameter.data = drawn(*parameter.shape, seed=0) / 10
    x, counts = drawn(18, 64, seed=1), torch.tensor(COUNTS["some rows"])
    truth = module(x, counts)
    if INTERPRETED:
        monkeypatch.setattr(support, "grouped_mm_unsupported_reason", lambda device: None)
        monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
        monkeypatch.setattr(Tensor, "is_cuda", True)
        monkeypatch.setitem(common.GPUS, torch.device("cpu"), common.Gpu(90, 132))
        monkeypatch.setattr("llama4.model.experts.swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up)
    else:
        support.grouped_mm_unsupported_reason(x.to(DEVICE).device)  # tries the kernel, which is not counted
    launched, kernel = 0, launch_products.grouped_mm

    def counted(*tensors: Tensor) -> Tensor:
        nonlocal launched
        launched += 1
        return kernel(*tensors)

    monkeypatch.setattr(launch_products, "grouped_mm", counted)
    y = module.to(DEVICE)(x.to(DEVICE), counts.to(DEVICE))
    if INTERPRETED or common.gpu(y.device).capability // 10 == 9:
        assert launched == 2
    assert (y.cpu().double() - truth.double()).norm() / truth.double().norm() < 1e-2


@needs_the_interpreter
def test_in_the_interpreter() -> None:
    run_again(__file__)


@needs_the_compiler
def test_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an H100, at Scout's sizes: with its copy engine and its tensor cores, and within its shared memory."""
    compiled = compile_only(90, monkeypatch, tmp_path)
    counts = torch.empty(16, dtype=torch.int64, device="meta")
    for rows in (1, 1024, 2048):
        x, weights = (
            torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((rows, 5120), (16, 5120, 16384))
        )
        launch_products.grouped_mm(x, counts, weights)
    assert len({kernel.asm["ptx"] for kernel in compiled}) == len(compiled) == 3
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 227 * 1024
        assert all(name in kernel.asm["ptx"] for name in ("wgmma.mma_async", "cp.async.bulk.tensor"))
