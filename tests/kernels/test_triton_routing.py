"""The Triton kernels around the experts against the torch way: on a GPU where there is one, else in Triton's
interpreter. That they compile for GPUs needs neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4.kernels import loader
from llama4.kernels.triton import common, launch_routing, support
from llama4.model.multimodal import Llama4Model
from llama4.ops import gpu_kernels, routing
from llama4.ops.routing import top_k
from tests import small_model
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

DTYPES = [torch.float32, torch.bfloat16]
ULP = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""The distance of neighbours, relative to a number: the interpreter cuts off where a GPU rounds."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def check(given: tuple[Tensor, ...], truth: routing.Dispatched) -> None:
    """Rows to the precision of their dtype, all else exactly."""
    x_RD, counts_E, tokens_R, rows_Nk = (tensor.cpu() for tensor in given)
    assert x_RD.dtype == truth.x_RD.dtype
    assert torch.allclose(x_RD, truth.x_RD, rtol=ULP[x_RD.dtype], atol=1e-6, equal_nan=True)
    for own, other in zip((counts_E, tokens_R, rows_Nk), truth[1:], strict=True):
        assert own.dtype == torch.int64
        assert own.equal(other)


@needs_the_interpreter
def test_in_the_interpreter() -> None:
    run_again(__file__)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "E", "D"), [(0, 4, 64), (1, 16, 5120), (5, 3, 1000), (2, 128, 32)])
def test_router_logits(rows: int, E: int, D: int, dtype: torch.dtype) -> None:
    x_ND, weight_ED = drawn(rows, D, dtype=dtype), drawn(E, D, dtype=dtype, seed=1)
    logits_NE = launch_routing.router_logits(x_ND.to(DEVICE), weight_ED.to(DEVICE)).cpu()
    assert logits_NE.dtype == torch.float32
    assert torch.allclose(logits_NE.double(), x_ND.double() @ weight_ED.double().mT, rtol=1e-5, atol=1e-4)


CHOICES = [(0, 1, 4), (1, 1, 16), (7, 1, 3), (64, 1, 16), (65, 1, 16), (3, 2, 128)]
"""Tokens, experts of each, experts."""


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "E"), CHOICES)
def test_dispatch(tokens: int, k: int, E: int, dtype: torch.dtype) -> None:
    x_ND = drawn(tokens, 40, dtype=dtype)
    scores_Nk, experts_Nk = drawn(tokens, E).topk(k)
    truth = routing.dispatch(x_ND, scores_Nk, experts_Nk, E)
    check(launch_routing.dispatch(x_ND.to(DEVICE), scores_Nk.to(DEVICE), experts_Nk.to(DEVICE), E), truth)


@on_a_device
@pytest.mark.parametrize("k", [1, 2])
def test_dispatch_many(k: int) -> None:
    """Choices in more than one block, most of them of one expert."""
    tokens = 1030 // k
    x_ND, scores_Nk = drawn(tokens, 8), drawn(tokens, k, seed=1)
    experts_Nk = (drawn(tokens, 4) + torch.tensor([0, 9, 0, 1])).topk(k).indices
    truth = routing.dispatch(x_ND, scores_Nk, experts_Nk, 4)
    check(launch_routing.dispatch(x_ND.to(DEVICE), scores_Nk.to(DEVICE), experts_Nk.to(DEVICE), 4), truth)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "E"), [(0, 4), (1, 16), (2, 128), (7, 3), (64, 16)])
def test_dispatch_top_1(tokens: int, E: int, dtype: torch.dtype) -> None:
    """Of logits that tie, the first counts."""
    x_ND, logits_NE = drawn(tokens, 1030, dtype=dtype), drawn(tokens, E).round()
    logits_N1, experts_N1 = top_k(logits_NE, 1)
    truth = routing.dispatch(x_ND, logits_N1.sigmoid(), experts_N1, E)
    check(launch_routing.dispatch_top_1(x_ND.to(DEVICE), logits_NE.to(DEVICE)), truth)


@on_a_device
@pytest.mark.parametrize("E", [5, 16])
def test_logits_that_are_no_numbers(E: int) -> None:
    """As torch chooses: the first NaN, whose rows are NaN; so nothing is read or written where no row is."""
    logits_NE = drawn(9, E)
    logits_NE[1] = logits_NE[4, 2:] = logits_NE[5, 0] = logits_NE[8, E - 1] = torch.nan
    logits_NE[2, 3], logits_NE[6] = torch.inf, -torch.inf
    logits_NE[7, 0], logits_NE[7, 3] = torch.inf, torch.nan
    x_ND = drawn(9, 64)
    logits_N1, experts_N1 = top_k(logits_NE, 1)
    truth = routing.dispatch(x_ND, logits_N1.sigmoid(), experts_N1, E)
    check(launch_routing.dispatch_top_1(x_ND.to(DEVICE), logits_NE.to(DEVICE)), truth)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_combine(tokens: int, k: int, dtype: torch.dtype) -> None:
    routed_RD, out_ND = drawn(tokens * k, 1030, dtype=dtype), drawn(tokens, 1030, dtype=dtype, seed=1)
    rows_Nk = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(0)).view(tokens, k)
    before_ND = out_ND.clone()
    sum_ND = launch_routing.combine(routed_RD.to(DEVICE), rows_Nk.to(DEVICE), out_ND.to(DEVICE)).cpu()
    assert sum_ND.dtype == torch.float32
    assert torch.equal(out_ND, before_ND)
    truth_ND = routing.combine(routed_RD, rows_Nk, out_ND)
    assert torch.equal(sum_ND, truth_ND) if k == 1 else torch.allclose(sum_ND, truth_ND, rtol=1e-6, atol=1e-6)


@on_a_device
def test_operations_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is trained does not."""
    if INTERPRETED:
        monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
        monkeypatch.setattr(Tensor, "is_cuda", True)
    launches = []
    launched = common.launch

    def counted(*arguments: Any, **sizes: Any) -> None:
        launches.append(arguments[0])
        launched(*arguments, **sizes)

    monkeypatch.setattr(common, "launch", counted)
    x_ND, weight_ED = drawn(3, 64).to(DEVICE), drawn(4, 64).to(DEVICE)

    def all_of_them() -> Tensor:
        scores_N1, experts_N1 = top_k(routing.router_logits(x_ND, weight_ED), 1)
        dispatched = routing.dispatch(x_ND, scores_N1, experts_N1, 4)
        return routing.combine(dispatched.x_RD, dispatched.rows_Nk, x_ND)

    y_ND = all_of_them()
    assert len(launches) == 4
    x_ND.requires_grad_()
    assert torch.allclose(all_of_them(), y_ND, rtol=1e-5, atol=1e-5)
    assert len(launches) == 4


@on_a_device
@pytest.mark.skipif(not INTERPRETED, reason="the tests of whole models on a GPU see to it there")
def test_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and step give by the kernels what they give without."""
    monkeypatch.setattr(loader, "library", lambda: None)
    model = Llama4Model(small_model.with_two_layers(small_model.config())).eval()
    ids_BT = torch.arange(2 * 4).view(2, 4) + 3
    model.init_weights(torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        cache = model.new_cache(2)
        return torch.cat([model(part, cache=cache) for part in ids_BT.split([3, 1], dim=1)], dim=1)

    with torch.no_grad():
        truth_BTV = logits()
        launches: set[str] = set()
        launched = common.launch

        def counted(kernel: Any, *arguments: Any, **sizes: Any) -> None:
            launches.add(kernel.fn.__name__)
            launched(kernel, *arguments, **sizes)

        monkeypatch.setattr(common, "launch", counted)
        monkeypatch.setattr(gpu_kernels, "unsupported_reason", lambda *tensors: None)
        assert torch.allclose(logits(), truth_BTV, rtol=1e-4, atol=1e-4)
    between = {"rms_norm", "apply_rope", "swiglu"}
    assert launches == between | {"router_logits", "sort_by_expert", "scatter_scaled", "combine"}


@needs_the_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("E", [16, 128])
def test_compiles(E: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an A100 and an H100, at Scout's and Maverick's sizes."""
    compiled = compile_only(capability, monkeypatch, tmp_path)
    with torch.device("meta"):
        for tokens in (1, 64, 2048):
            x_ND, weight_ED = torch.empty(tokens, 5120).bfloat16(), torch.empty(E, 5120).bfloat16()
            logits_NE, experts_N1 = torch.empty(tokens, E), torch.empty(tokens, 1, dtype=torch.int64)
            if tokens <= launch_routing.MAX_TOP_1:
                launch_routing.router_logits(x_ND, weight_ED)
                launch_routing.dispatch_top_1(x_ND, logits_NE)
            launch_routing.dispatch(x_ND, logits_NE[:, :1], experts_N1, E)
            launch_routing.combine(x_ND, experts_N1, x_ND)
    assert len(compiled) == 13
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 48 * 1024
