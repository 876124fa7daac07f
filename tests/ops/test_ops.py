"""Every operation, in torch and by the compiled kernels, against itself in float64; and why a kernel is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from llama4.cache.formats import QUANTIZED, Unquantized
from llama4.kernels import cpu, loader
from llama4.ops import attention, cpu_kernels, experts, linear, norm, quantized, rope, sampling, swiglu
from llama4.ops.quantized import Parts
from tests.marks import needs_kernels


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, truth: Tensor) -> bool:
    """float32 rounds sums of hundreds of products to 1e-6 of the largest; bfloat16 rounds what comes out, and what is
    between two products, by up to 2^-9 of itself."""
    assert truth.dtype == torch.float64
    bound = 2e-6 if ours.dtype == torch.float32 else 1e-2
    return bool((ours.double() - truth).abs().max() < bound * truth.abs().max())


@pytest.fixture(params=["torch", pytest.param("kernels", marks=needs_kernels)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(loader, "library", lambda: None)
    with cpu_kernels.any_size():
        yield name


def test_a_tower_in_bfloat16_can_be_compiled() -> None:
    """All in one graph: what the CPU has is not looked up while torch.compile traces."""
    x, weight, bias = (normal(*shape, dtype=torch.bfloat16) for shape in ((2, 5, 64), (96, 64), (96,)))
    compiled = torch.compile(linear.linear_of_tower, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
class TestEitherWay:
    def test_rms_norm(self, rows: int, dtype: torch.dtype, way: str) -> None:
        x, weight = normal(rows, 48), normal(48, seed=1, dtype=dtype)
        y = norm.rms_norm(x, weight, 1e-3)
        assert y.dtype == dtype
        assert (norm.unsupported_reason(x, weight) is None) == (way == "kernels")
        assert close(y, norm.rms_norm(x.double(), weight.double(), 1e-3))

    @pytest.mark.parametrize("rotated", [True, False])
    @pytest.mark.parametrize("eps", [None, 1e-3])
    @pytest.mark.parametrize("scaled", [True, False])
    def test_apply_rope(
        self, rows: int, dtype: torch.dtype, way: str, rotated: bool, eps: float | None, scaled: bool
    ) -> None:
        q, k = normal(rows, 4, 32, dtype=dtype), normal(rows, 2, 32, seed=1, dtype=dtype)
        angles, temperature = normal(rows, 16, seed=2).double(), normal(rows, seed=3) if scaled else None
        rotation = torch.polar(torch.ones_like(angles), angles) if rotated else None
        truth = rope.apply_rope(
            q.double(), k.double(), rotation, eps, temperature.double() if temperature is not None else None
        )
        rotation = rotation.to(torch.complex64) if rotation is not None else None
        assert (rope.unsupported_reason(q, k) is None) == (way == "kernels")
        for ours, exact in zip(rope.apply_rope(q, k, rotation, eps, temperature), truth, strict=True):
            assert ours.dtype == dtype
            assert close(ours, exact)

    def test_swiglu(self, rows: int, dtype: torch.dtype, way: str) -> None:
        gate, up = normal(rows, 96, dtype=dtype).chunk(2, dim=-1)
        assert (swiglu.unsupported_reason(gate, up) is None) == (way == "kernels")
        assert close(swiglu.swiglu(gate, up), swiglu.swiglu(gate.double(), up.double()))

    @pytest.mark.parametrize("inputs", [48, 96, 528])
    def test_linear(self, rows: int, dtype: torch.dtype, way: str, inputs: int) -> None:
        """48 and 528 are no multiples of the 32 inputs that kernels for bfloat16 read at a time."""
        x, weight_OI = normal(rows, inputs, dtype=dtype), normal(64, inputs, seed=1, dtype=dtype)
        truth = x.double() @ weight_OI.double().mT
        has_kernel = way == "kernels" and (dtype == torch.float32 or inputs == 96)
        assert (linear.unsupported_reason(x, weight_OI) is None) == has_kernel
        assert close(linear.linear(x, weight_OI), truth)
        assert close(linear.linear_in_out(x, weight_OI.mT.contiguous()), truth)
        assert close(linear.linear_in_out(x, weight_OI.mT), truth), "not contiguous"

    @pytest.mark.parametrize("inputs", [64, 72])
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear_of_a_tower(
        self, rows: int, dtype: torch.dtype, way: str, inputs: int, bias: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows of 72 are for torch; so is float32."""
        monkeypatch.setattr(cpu_kernels, "has_bfloat16_instructions", lambda: False)
        x, weight = normal(2, rows, inputs, dtype=dtype), normal(96, inputs, seed=1, dtype=dtype)
        added = normal(96, seed=2, dtype=dtype) if bias else None
        truth = x.double() @ weight.double().mT + (0.0 if added is None else added.double())
        called: list[Tensor] = []

        def product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
            called.append(x_NI)
            return kernel(x_NI, weight_OI)

        kernel = cpu.linear
        monkeypatch.setattr(cpu, "linear", product)
        y = linear.linear_of_tower(x, weight, added)
        assert y.dtype == dtype
        assert close(y, truth)
        assert close(linear.linear_of_tower(x[0, 0], weight, added), truth[0, 0])
        assert bool(called) == (way == "kernels" and dtype == torch.bfloat16 and inputs == 64)

    @pytest.mark.parametrize("past", [0, 1, 300])
    def test_attention_without_a_cache_has_no_past(self, rows: int, dtype: torch.dtype, way: str, past: int) -> None:
        """Attention over a past and new tokens is the merged attention over each; 300 queries would be more than one
        block of them."""
        q, k, v = (normal(rows + past, heads, 32, seed=heads, dtype=dtype) for heads in (4, 2, 2))
        ours = attention.causal_attention(q, k, v)
        q_HNC, k_KSC, v_KSC = (x.double().transpose(0, 1) for x in (q, k, v))
        truth = attention.merge([attention.softmax_attention(q_HNC, k_KSC, v_KSC, causal=True)]).transpose(0, 1)
        assert close(ours, truth)
        new_HNC = q_HNC[:, past:]
        parts = [attention.softmax_attention(new_HNC, k_KSC[:, past:], v_KSC[:, past:], causal=True)]
        parts += [attention.softmax_attention(new_HNC, k_KSC[:, :past], v_KSC[:, :past], causal=False)] * (past > 0)
        assert torch.allclose(attention.merge(parts).transpose(0, 1), truth[past:])

    def test_greedy_token(self, rows: int, dtype: torch.dtype, way: str) -> None:
        logits = normal(rows, 600, dtype=dtype)
        logits[:, [7, 9]] = 8.0  # the first of equals
        ids, logprobs = sampling.greedy_token(logits)
        assert ids.tolist() == [7] * rows
        assert (ids.dtype, logprobs.dtype) == (torch.int64, torch.float32)
        assert torch.allclose(logprobs.double(), logits.double().log_softmax(-1)[:, 7], atol=2e-6)

    def test_experts(self, rows: int, dtype: torch.dtype, way: str) -> None:
        gate_up_EDI, down_EFD = normal(3, 64, 96, dtype=dtype), normal(3, 48, 64, seed=1, dtype=dtype)

        def expert(x_RD: Tensor, i: int) -> Tensor:
            gate, up = (x_RD @ gate_up_EDI[i].to(x_RD.dtype)).chunk(2, dim=-1)
            return swiglu.swiglu(gate, up) @ down_EFD[i].to(x_RD.dtype)

        x, counts = normal(rows, 64, seed=2, dtype=dtype), torch.tensor([rows - rows // 2, 0, rows // 2])
        assert (linear.in_out_matrix(gate_up_EDI, dtype) is not None) == (way == "kernels")
        truth = experts.loop_over_experts(expert, x.double(), counts)
        assert close(experts.swiglu_experts(expert, x, counts, gate_up_EDI, down_EFD), truth)


def trained(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


ROW, MATRIX, HEADS = normal(1, 64), normal(64, 64), normal(1, 2, 32)
REASONS: dict[str, tuple[Callable[[], str | None], str]] = {
    "a device": (lambda: norm.unsupported_reason(ROW.to("meta"), ROW[0].to("meta")), "not on the CPU"),
    "a dtype": (lambda: swiglu.unsupported_reason(ROW.half(), ROW.half()), "neither float32 nor bfloat16"),
    "two dtypes": (lambda: swiglu.unsupported_reason(ROW, ROW.bfloat16()), "different dtypes"),
    "rows in bfloat16": (lambda: norm.unsupported_reason(ROW.bfloat16(), ROW[0].bfloat16()), "not float32"),
    "a gradient": (lambda: linear.unsupported_reason(ROW, trained(MATRIX)), "needs a gradient"),
    "a gradient of rows": (lambda: rope.unsupported_reason(trained(HEADS), HEADS), "needs a gradient"),
    "a width": (lambda: swiglu.unsupported_reason(ROW[:, :40], ROW[:, :40]), "multiple of 16"),
    "a transposed matrix": (lambda: linear.unsupported_reason(ROW, MATRIX.mT), "not contiguous"),
    "rows and matrix": (lambda: linear.unsupported_reason(ROW, MATRIX.bfloat16()), "another dtype"),
    "no rows": (lambda: linear.unsupported_reason(ROW[:0], MATRIX), "no rows"),
    "large heads": (lambda: rope.unsupported_reason(*[normal(1, 1, 2048)] * 2), "larger than 1024"),
    "another cache": (lambda: attention.unsupported_reason(HEADS, 9, Unquantized(torch.bfloat16)), "the cache is in"),
    "odd heads": (lambda: attention.unsupported_reason(normal(1, 2, 48), 9, QUANTIZED["int4"]), "multiple of 32"),
    "inputs of experts": (lambda: linear.in_out_unsupported_reason(MATRIX[None, :40], MATRIX.dtype), "multiple of 16"),
    "a format": (
        lambda: quantized.unsupported_reason(ROW, quantized.Parts("nf4", MATRIX, MATRIX, 64)),
        "no kernels for nf4",
    ),
    "groups": (
        lambda: quantized.unsupported_reason(ROW, Parts("int8", MATRIX.char(), MATRIX[:, :2].contiguous(), 64, 32)),
        "more than one scale",
    ),
    "groups of int4": (lambda: quantized.interleave_unsupported_reason(64, 128, 48), "groups are not"),
    "outputs of int4": (lambda: quantized.interleave_unsupported_reason(60, 128, 32), "no multiple of [16, 32]"),
}


@needs_kernels
@pytest.mark.parametrize("name", REASONS)
def test_why_a_kernel_is_not_used(name: str) -> None:
    reason, expected = REASONS[name]
    with cpu_kernels.any_size():
        assert expected in (reason() or "")


@needs_kernels
def test_small_tensors_are_for_torch() -> None:
    for reason in (
        norm.unsupported_reason(ROW, ROW[0]),
        rope.unsupported_reason(HEADS, HEADS),
        linear.unsupported_reason(ROW, MATRIX[:16]),
        attention.unsupported_reason(HEADS, 9, Unquantized(torch.float32)),
        quantized.quantize_unsupported_reason(MATRIX[:16], 32),
        sampling.unsupported_reason(ROW),
    ):
        assert "for a call to pay" in (reason or "")
    with torch.no_grad(), cpu_kernels.any_size():
        assert linear.unsupported_reason(ROW, trained(MATRIX)) is None, "no gradient is recorded"


def test_without_a_compiler_the_reason_is_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "library", lambda: None)
    with cpu_kernels.any_size():
        for reason in (
            norm.unsupported_reason(ROW, ROW[0]),
            linear.unsupported_reason(ROW, MATRIX),
            quantized.quantize_unsupported_reason(MATRIX, 32),
        ):
            assert reason == "there are no CPU kernels, or they are switched off"
