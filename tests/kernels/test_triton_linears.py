"""Products on a GPU that share what they do with their rows, or do it together with what makes the rows: the bits are
those of one operation after the other (of matrices so small that a product alone is launched alike). In Triton's
interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama4.kernels.triton import common, support
from llama4.model.feed_forward import FeedForward
from llama4.ops import fp8, quantized_gpu
from llama4.ops.linear import linear_of_swiglu, linears
from llama4.ops.swiglu import swiglu
from llama4.quantization.fp8 import Fp8
from llama4.quantization.int4 import Int4
from llama4.quantization.int8 import Int8
from llama4.quantization.modules import QuantizedExperts
from llama4.quantization.weight import QuantizedWeight, WeightFormat
from tests.kernels.interpreter import DEVICE, INTERPRETED, needs_the_interpreter, on_a_device, run_again
from tests.quantization.test_weight import name_of, packed

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("bfloat16_in_the_interpreter", "launches_in_the_interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered"),
]

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 3, 20]
"""None, few, and more than few."""


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
        monkeypatch.setattr(Tensor, "is_cuda", True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels between products, as they are launched."""
    names: list[str] = []
    launch = common.launch

    def counted(kernel: Any, *rest: Any, **sizes: Any) -> None:
        if kernel.fn.__name__ not in ("gemv", "grouped_gemm"):
            names.append(kernel.fn.__name__)
        launch(kernel, *rest, **sizes)

    monkeypatch.setattr(common, "launch", counted)
    return names


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def strange(x: Tensor) -> Tensor:
    """Rows with numbers that are none, one of zeros, and one of which the largest is alone."""
    for i, number in enumerate((torch.nan, torch.inf, -torch.inf, 1e30)[: len(x)]):
        x[i, i] = number
    x[4:5] = 0
    return x


def matrix(outputs: int, inputs: int, format: WeightFormat, seed: int = 0) -> QuantizedWeight:
    return packed(drawn(outputs, inputs, seed=seed).cpu().bfloat16(), format).to(DEVICE)


def same(y: Tensor, truth: Tensor) -> bool:
    return y.dtype == truth.dtype and torch.equal(y.nan_to_num(1234.5), truth.nan_to_num(1234.5))


@needs_the_interpreter
def test_in_the_interpreter() -> None:
    run_again(__file__)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", [Int4(32), Int8(), Fp8()], ids=name_of)
def test_of_the_same_rows(format: WeightFormat, rows: int, dtype: torch.dtype, launched: list[str]) -> None:
    modules = [matrix(outputs, 64, format, seed=outputs) for outputs in (48, 32, 32)]
    for x in (strange(drawn(rows, 64, dtype=dtype)), drawn(rows, 128, dtype=dtype)[:, ::2]):
        truths = [module(x) for module in modules]
        launched.clear()
        outputs = linears(modules, x)
        assert launched == ["to_fp8"] * (format.kind == "fp8")
        assert all(same(y, truth) for y, truth in zip(outputs, truths, strict=True))


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", [Int4(32), Fp8()], ids=name_of)
def test_of_swiglu(format: WeightFormat, rows: int, dtype: torch.dtype, launched: list[str]) -> None:
    down, both_N2F = matrix(48, 64, format), strange(8 * drawn(rows, 128, dtype=dtype))
    for gate_NF, up_NF in (both_N2F.chunk(2, dim=-1), (both_N2F[:, ::2], both_N2F[:, :64])):
        truth = down(swiglu(gate_NF, up_NF))
        launched.clear()
        y = linear_of_swiglu(down, gate_NF, up_NF)
        assert launched == (["swiglu_to_fp8"] if format.kind == "fp8" else ["swiglu"])
        assert same(y, truth)


@on_a_device
@pytest.mark.parametrize("rows", ROWS)
def test_experts(rows: int, launched: list[str]) -> None:
    experts = QuantizedExperts()
    experts.gate_up_proj = packed(drawn(3, 64, 32).cpu().bfloat16(), Fp8()).to(DEVICE)
    experts.down_proj = packed(drawn(3, 32, 32, seed=1).cpu().bfloat16(), Fp8()).to(DEVICE)
    x_RD, counts_E = strange(drawn(rows, 32, dtype=torch.bfloat16)), torch.tensor([rows - rows // 3, 0, rows // 3])
    counts_E = counts_E.to(DEVICE)
    stacks = experts.gate_up_proj, experts.down_proj
    (gate_up, gate_up_scale), (down, down_scale) = ((each.part("weight"), each.part("weight_scale")) for each in stacks)
    hidden_RF = swiglu(*quantized_gpu.linear("fp8", x_RD, gate_up, gate_up_scale, counts_E).chunk(2, dim=-1))
    truth_RD = quantized_gpu.linear("fp8", hidden_RF, down, down_scale, counts_E)
    launched.clear()
    assert same(experts(x_RD, counts_E), truth_RD)
    assert launched == ["to_fp8", "swiglu_to_fp8"]


@on_a_device
def test_by_torchs_product(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """It takes what was rounded once."""

    def scaled_mm(
        x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, *, out_dtype: torch.dtype, **_: bool
    ) -> Tensor:
        return (x.float() @ weight.float() * x_scale * scale).to(out_dtype)

    if INTERPRETED:
        monkeypatch.setattr(fp8, "has_fp8_matmul", lambda device, grouped=False: True)
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)  # some versions have none of rows on a CPU
    mlp: Any = FeedForward(64, 48)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (matrix(*shape, Fp8()) for shape in ((48, 64), (48, 64), (64, 48)))
    x = drawn(20, 64, dtype=torch.bfloat16)
    truth = mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
    launched.clear()
    assert same(mlp(x), truth)
    assert launched == ["to_fp8", "swiglu_to_fp8"]


def add_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output + 1)


def add_hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: inputs[0] + 1)


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    vars(module)["forward"] = lambda x: forward(x) + 1


def add_bias(module: QuantizedWeight) -> None:
    module.bias = nn.Parameter(drawn(module.shape[0]))


def put_in_order(module: QuantizedWeight) -> None:
    module.order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@on_a_device
@pytest.mark.parametrize("change", [add_hook, add_hook_before, replace_forward, add_bias, put_in_order])
@pytest.mark.parametrize("rows", [3, 20])
def test_what_a_module_does_besides(change: Callable[[QuantizedWeight], None], rows: int) -> None:
    """Is done, whichever of them it is."""
    x, gate, up = (drawn(rows, 64, seed=seed) for seed in range(3))
    for changed in (0, 1):
        modules = [matrix(32, 64, Fp8(), seed) for seed in (0, 1)]
        plain = modules[changed](x)
        change(modules[changed])
        outputs = linears(modules, x)
        assert all(same(y, module(x)) for y, module in zip(outputs, modules, strict=True))
        assert not same(outputs[changed], plain)
        assert same(linear_of_swiglu(modules[changed], gate, up), modules[changed](swiglu(gate, up)))


@on_a_device
def test_of_different_kinds() -> None:
    """Formats, Linears, and what is trained: one by one, as it was."""
    x = drawn(3, 64)
    for others in (matrix(32, 64, Int8()), nn.Linear(64, 32, device=DEVICE)), (matrix(32, 64, Fp8()),) * 2:
        modules = [matrix(32, 64, Fp8()), *others]
        for rows in (x, x.clone().requires_grad_()):
            outputs = linears(modules, rows)
            assert all(same(y, module(rows)) for y, module in zip(outputs, modules, strict=True))
            assert all(y.requires_grad for y in outputs) or not rows.requires_grad


@on_a_device
@pytest.mark.parametrize("trained", ["gate", "up"])
@pytest.mark.parametrize("rows", [3, 20])
def test_what_a_gradient_is_wanted_of(trained: str, rows: int) -> None:
    """One of the two that make the rows suffices."""
    inputs = {name: drawn(rows, 64, seed=seed) for seed, name in enumerate(("gate", "up"))}
    inputs[trained].requires_grad_()
    down = matrix(32, 64, Fp8())
    found, truth = (
        torch.autograd.grad(y.square().sum(), inputs[trained])[0]
        for y in (linear_of_swiglu(down, *inputs.values()), down(swiglu(*inputs.values())))
    )
    assert same(found, truth)
    assert found.any()


@on_a_device
def test_scales_of_fp8_are_float32() -> None:
    """So that products convert none; in a checkpoint they are as they were."""
    weight = drawn(32, 64).cpu().bfloat16()
    values, scale = (part.to(DEVICE) for part in Fp8().quantize(weight).values())
    module = matrix(32, 64, Fp8())
    assert module.part("weight_scale").dtype == torch.float32
    assert module.checkpoint_dtype("weight_scale") == scale.dtype == torch.bfloat16
    assert torch.equal(module.checkpoint_layout("weight_scale"), scale)
    assert torch.equal(module.checkpoint_layout("weight").view(torch.uint8), values.view(torch.uint8))
    assert matrix(32, 64, Int8()).part("weight_scale").dtype == torch.bfloat16


def test_on_a_cpu_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    modules = [packed(torch.randn(32, 64).bfloat16(), Fp8()) for _ in range(2)]
    assert modules[0].part("weight_scale").dtype == torch.bfloat16
    x = torch.ones(20, 64)
    assert modules[0].together(modules, x) is None
    assert modules[0].of_swiglu(x, x) is None
