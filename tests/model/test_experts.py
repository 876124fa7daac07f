"""Every backend of the experts against float64; MegaBlocks with a stand-in of the package, which needs a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.config import TextConfig
from llama4.model import experts as module
from llama4.model.experts import BACKENDS, Experts, LoopExperts, MegaBlocksExperts, resolve_experts
from llama4.model.moe import MixtureOfExperts
from tests.marks import needs_kernels

CONFIG = TextConfig(hidden_size=64, intermediate_size=96, num_local_experts=5)
COUNTS = {
    "none": [0, 0, 0, 0, 0],
    "one": [0, 0, 1, 0, 0],
    "few": [2, 0, 1, 3, 0],
    "all to one": [0, 0, 0, 0, 40],
    "many": [40, 17, 0, 90, 33],
    "more than are computed together": [0, 700, 400, 0, 1100],
    "just as many": [1023, 0, 1, 0, 3],
}
WIDE = TextConfig(hidden_size=512, intermediate_size=512, num_local_experts=5)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def init(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-2] ** -0.5)


def check(experts: Experts, device: torch.device, dtype: torch.dtype, counts: list[int]) -> None:
    init(experts)
    experts = experts.to(device, dtype)
    x_RD = torch.randn(sum(counts), experts.gate_up_proj.shape[1], generator=torch.Generator().manual_seed(1)).to(
        device, dtype
    )
    truth = []
    for rows, gate_up, down in zip(x_RD.double().split(counts), experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = (rows @ gate_up.double()).chunk(2, dim=-1)
        truth.append((F.silu(gate) * up) @ down.double())
    truth_RD = torch.cat(truth)
    with torch.no_grad():
        y_RD = experts(x_RD, torch.tensor(counts, device=device))
    assert y_RD.shape == x_RD.shape
    assert y_RD.dtype == dtype
    if len(x_RD):
        error = ((y_RD.double() - truth_RD).norm() / truth_RD.norm()).item()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2), "bfloat16 rounds three times, by up to 2^-9 each"


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_on_a_cpu(name: str, dtype: torch.dtype, counts: str) -> None:
    check(BACKENDS[name](CONFIG), CPU, dtype, COUNTS[counts])


@needs_kernels
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_one_call(dtype: torch.dtype, counts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if counts != "none":
        monkeypatch.delattr("llama4.ops.experts.loop_over_experts")
    check(LoopExperts(WIDE), CPU, dtype, COUNTS[counts])


def test_in_one_call_unless_they_are_trained() -> None:
    experts, counts = LoopExperts(WIDE), torch.tensor([2, 0, 20, 1, 0])
    init(experts)
    x_RD = torch.randn(23, 512, generator=torch.Generator().manual_seed(1))
    y_RD = experts(x_RD, counts)
    y_RD.sum().backward()
    assert experts.down_proj.grad is not None
    assert experts.down_proj.grad[1].count_nonzero() == 0 < experts.down_proj.grad[2].count_nonzero()
    with torch.no_grad():
        assert torch.allclose(experts(x_RD, counts), y_RD, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_gpu(name: str, dtype: torch.dtype, counts: str) -> None:
    if reason := BACKENDS[name].unsupported_reason(CUDA, dtype):
        pytest.skip(reason)
    check(BACKENDS[name](CONFIG), CUDA, dtype, COUNTS[counts])


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """MegaBlocks' product, with its own conditions but for the device, in torch."""
    assert a.ndim == 2 and a.dtype == torch.bfloat16 and a.is_contiguous()
    assert b.ndim == 3 and b.dtype == torch.bfloat16 and b.is_contiguous()
    assert batch_sizes.ndim == 1 and batch_sizes.dtype == torch.int64 and batch_sizes.is_cpu
    assert len(batch_sizes) == len(b)
    assert a.shape[1] == b.shape[2 if trans_b else 1]
    assert batch_sizes.sum() == len(a) > 0, "so many rows have to be there"
    matrices = b.mT if trans_b else b
    return torch.cat([rows @ m for rows, m in zip(a.split(batch_sizes.tolist()), matrices, strict=True)])


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts stand-ins of packages into sys.modules; those that are None are not installed."""

    def put(**packages: Any) -> None:
        monkeypatch.setattr(module, "find_spec", lambda name: name if packages.get(name) is not None else None)
        for name, contents in packages.items():
            package = ModuleType(name)
            package.__dict__.update(contents or {})
            monkeypatch.setitem(sys.modules, name, package if contents is not None else None)

    module.megablocks_product.cache_clear()
    yield put
    module.megablocks_product.cache_clear()


def package(available: bool = True) -> dict[str, Any]:
    ops = SimpleNamespace(gmm=gmm) if available else None
    return {"grouped_gemm_util": SimpleNamespace(grouped_gemm_is_available=lambda: available, ops=ops)}


def hub(fetched: list[tuple[str, int]]) -> dict[str, Any]:
    def get_kernel(repo_id: str, *, version: int) -> Any:
        fetched.append((repo_id, version))
        return SimpleNamespace(gg_ops=SimpleNamespace(gmm=gmm))

    return {"get_kernel": get_kernel}


class TestMegaBlocks:
    @pytest.mark.parametrize("counts", COUNTS)
    def test_gives_what_the_loop_gives(self, counts: str, modules: Callable[..., None]) -> None:
        modules(megablocks=package(), kernels=None)
        check(MegaBlocksExperts(CONFIG), CPU, torch.bfloat16, COUNTS[counts])

    def test_the_score_is_on_the_input(self, modules: Callable[..., None]) -> None:
        modules(megablocks=package(), kernels=None)
        layers = [MixtureOfExperts(CONFIG, backend).bfloat16() for backend in (MegaBlocksExperts, LoopExperts)]
        for layer in layers:
            init(layer)
        x_ND = torch.randn(12, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
        with torch.no_grad():
            ours, loop = (layer(x_ND) for layer in layers)
        assert torch.allclose(ours, loop, atol=1e-2 * loop.abs().max().item())

    def test_trains(self, modules: Callable[..., None]) -> None:
        modules(megablocks=package(), kernels=None)
        experts = MegaBlocksExperts(CONFIG).bfloat16()
        init(experts)
        experts(torch.ones(3, 64, dtype=torch.bfloat16), torch.tensor([1, 0, 2, 0, 0])).sum().backward()
        assert experts.gate_up_proj.grad is not None
        assert experts.gate_up_proj.grad.abs().sum((1, 2)).gt(0).tolist() == [True, False, True, False, False]

    @pytest.mark.parametrize("installed", [None, package(available=False)], ids=["absent", "without grouped_gemm"])
    def test_from_the_hub_where_the_package_cannot(
        self, installed: dict[str, Any] | None, modules: Callable[..., None]
    ) -> None:
        fetched: list[tuple[str, int]] = []
        modules(megablocks=installed, kernels=hub(fetched))
        for _ in range(2):  # layers
            check(MegaBlocksExperts(CONFIG), CPU, torch.bfloat16, COUNTS["few"])
        assert fetched == [("kernels-community/megablocks", 1)]

    def test_says_why_it_cannot_be_had(self, modules: Callable[..., None]) -> None:
        def offline(repo_id: str, *, version: int) -> Any:
            raise OSError("no such host")

        modules(megablocks={}, kernels={"get_kernel": offline})
        with pytest.raises(ValueError, match=r"does not load \(cannot import.*does not load \(no such host\).*gpu\.md"):
            MegaBlocksExperts(CONFIG)

    def test_where_it_runs(self, modules: Callable[..., None]) -> None:
        modules(megablocks=None, kernels=None)
        with pytest.raises(ValueError, match=r"experts='megablocks' cannot run here: .* not for cpu; choose another"):
            resolve_experts("megablocks", CPU, torch.bfloat16)
        with pytest.raises(ValueError, match=r"wants bfloat16, not torch\.float32"):
            resolve_experts("megablocks", CUDA, torch.float32)
        with pytest.raises(ValueError, match=r"is not installed: pip install kernels"):
            resolve_experts("megablocks", CUDA, torch.bfloat16)

    def test_is_never_chosen_unasked(self, modules: Callable[..., None]) -> None:
        """What it would fetch is a program."""
        fetched: list[tuple[str, int]] = []
        modules(megablocks=None, kernels=hub(fetched))
        assert resolve_experts("megablocks", CUDA, torch.bfloat16) is MegaBlocksExperts
        for device in (CPU, CUDA):
            for dtype in (torch.float32, torch.bfloat16):
                assert resolve_experts("auto", device, dtype) is not MegaBlocksExperts
        assert not fetched
