"""The Triton kernels between matrix products against torch in float64: on a GPU where there is one, else in Triton's
interpreter. That they compile for GPUs needs neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.kernels.triton import common, launch_elementwise, support
from llama4.ops import fp8, gpu_kernels, norm, rope, swiglu
from llama4.vision.rope import rotate_both, unit_numbers
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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""The distance of neighbours, relative to a number: the interpreter cuts off where a GPU rounds. Of float32 a few."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def check(y: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Element by element, but that a sum of products may cancel in float32."""
    assert y.dtype == dtype
    assert y.shape == truth.shape
    assert truth.dtype == torch.float64
    assert torch.allclose(y.double(), truth, rtol=ULP[dtype], atol=1e-6)


@needs_the_interpreter
def test_in_the_interpreter() -> None:
    run_again(__file__)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 5120), (3, 1000), (2, 3, 96), (5, 1)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight_D = 3 * drawn(*shape), drawn(shape[-1], dtype=dtype, seed=1)
    for given in (x, x.to(dtype)):
        truth = norm.rms_normalise(given.double(), 1e-5) * weight_D.double()
        check(launch_elementwise.rms_norm(given, weight_D, 1e-5), truth, dtype)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 5120), (3, 100)])
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x_ND, delta_ND, weight_D = drawn(rows, width), drawn(rows, width, dtype=dtype, seed=1), drawn(width, dtype=dtype)
    before_ND = x_ND.clone()
    sum_ND, y_ND = launch_elementwise.add_rms_norm(x_ND, delta_ND, weight_D, 1e-5)
    assert torch.equal(x_ND, before_ND)
    assert torch.equal(sum_ND, x_ND + delta_ND)
    check(y_ND, norm.rms_normalise(sum_ND.double(), 1e-5) * weight_D.double(), dtype)


@on_a_device
@pytest.mark.parametrize("k", [1, 2])
def test_add_rms_norm_with_experts(k: int) -> None:
    x_ND, delta_ND, weight_D = drawn(4, 72), drawn(4, 72, dtype=torch.bfloat16, seed=1), drawn(72)
    routed_RD = drawn(4 * k, 72, dtype=torch.bfloat16, seed=2)
    rows_Nk = torch.randperm(4 * k, generator=torch.Generator().manual_seed(k)).view(4, k).to(DEVICE)
    sum_ND, y_ND = launch_elementwise.add_rms_norm(x_ND, delta_ND, weight_D, 1e-5, routed_RD, rows_Nk)
    truth_ND = x_ND.double() + delta_ND.double() + routed_RD[rows_Nk].double().sum(1)
    check(sum_ND, truth_ND, torch.float32)
    check(y_ND, norm.rms_normalise(truth_ND, 1e-5) * weight_D.double(), torch.float32)


def heads(dtype: torch.dtype, tokens: int, H: int, K: int, C: int) -> tuple[Tensor, Tensor]:
    """Queries and keys that are parts of one buffer."""
    qkv = drawn(tokens, (H + 2 * K) * C, dtype=dtype)
    q_NHC, k_NKC, _ = (part.unflatten(-1, (-1, C)) for part in qkv.split([H * C, K * C, K * C], dim=-1))
    return q_NHC, k_NKC


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "H", "K", "C"), [(1, 40, 8, 128), (3, 5, 5, 88), (4, 3, 1, 16), (0, 2, 1, 16)])
@pytest.mark.parametrize(("eps", "rotates"), [(1e-5, True), (None, True), (1e-5, False), (None, False)])
def test_apply_rope(tokens: int, H: int, K: int, C: int, eps: float | None, rotates: bool, dtype: torch.dtype) -> None:
    q_NHC, k_NKC = heads(dtype, tokens, H, K, C)
    rotation = unit_numbers(9 * drawn(tokens, C // 2).double(), torch.float32) if rotates else None
    wide = rotation.to(torch.complex128) if rotation is not None else None
    for temperature_N in (None, drawn(tokens, seed=2)):
        q, k = launch_elementwise.apply_rope(q_NHC, k_NKC, rotation, eps, temperature_N)
        factor = temperature_N.double() if temperature_N is not None else None
        true_q = rope._rotate_normalise_scale(q_NHC.double(), wide, eps, factor)
        check(q, true_q, dtype)
        check(k, rope._rotate_normalise_scale(k_NKC.double(), wide, eps, None), dtype)
        done_to_keys = rotates or eps is not None
        assert q.is_contiguous() or not (done_to_keys or temperature_N is not None)
        assert k.is_contiguous() or not done_to_keys


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_patches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every tile by the same rotations."""
    monkeypatch.setattr(gpu_kernels, "unsupported_reason", lambda *tensors: None)
    q_nLHC, k_nLHC = (drawn(3, 2, 4, 24, dtype=dtype, seed=seed) for seed in (0, 1))
    rotation_L1C = unit_numbers(drawn(2, 1, 12).double(), torch.float64)
    truths = rotate_both(q_nLHC.double(), k_nLHC.double(), rotation_L1C)
    for y, truth in zip(rope.rotate_patches(q_nLHC, k_nLHC, rotation_L1C.to(torch.complex64)), truths, strict=True):
        check(y, truth, dtype)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 8192), (3, 1000), (5, 1), (2, 1025)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    both_N2F = 8 * drawn(rows, 2 * width, dtype=dtype)
    for gate_NF, up_NF in (both_N2F.chunk(2, dim=-1), (both_N2F[:, ::2], both_N2F[:, :width])):
        check(launch_elementwise.swiglu(gate_NF, up_NF), F.silu(gate_NF.double()) * up_NF.double(), dtype)


@pytest.fixture(params=[80, 89])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without instructions for e4m3, and with; on a GPU as it is."""
    if INTERPRETED:
        request.getfixturevalue("e4m3_in_the_interpreter")
        monkeypatch.setitem(common.GPUS, torch.device("cpu"), common.Gpu(request.param, multiprocessors=8))


@on_a_device
@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 5120), (30, 1000), (2, 3, 96), (5, 1)])
def test_to_fp8(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 3 * drawn(*shape, dtype=dtype)
    check_fp8(launch_elementwise.to_fp8(x), x)


@on_a_device
@pytest.mark.usefixtures("rounds", "bfloat16_in_the_interpreter")
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (2, 8192), (3, 1000), (5, 1), (2, 1025)])
def test_swiglu_to_fp8(rows: int, width: int, dtype: torch.dtype) -> None:
    """To the bit what the two kernels give one after the other: also of halves and parts of wider rows, and of numbers
    that are none."""
    both_N2F = 8 * drawn(rows, 2 * width, dtype=dtype)
    strange_N2F = both_N2F.clone()
    for i, number in enumerate((torch.nan, torch.inf, -torch.inf, 0.0)[:rows]):
        strange_N2F[i, :: 3 if number else 1] = number
    for both in (both_N2F, strange_N2F):
        for gate_NF, up_NF in (both.chunk(2, dim=-1), (both[:, ::2], both[:, :width]), (both[:, :width].clone(),) * 2):
            check_fp8(launch_elementwise.swiglu_to_fp8(gate_NF, up_NF), launch_elementwise.swiglu(gate_NF, up_NF))


def check_fp8(rounded: tuple[Tensor, Tensor], x: Tensor) -> None:
    """To the bit what torch gives on a CPU; NaN may have either sign."""
    (values, scales), (true_values, true_scales) = rounded, fp8.to_fp8(x.cpu(), torch.float32)
    assert values.dtype == true_values.dtype
    bits, true_bits = (
        torch.where(each.float().isnan(), 127, each.view(torch.uint8)) for each in (values.cpu(), true_values)
    )
    assert torch.equal(bits, true_bits)
    assert scales.dtype == true_scales.dtype
    assert torch.allclose(scales.cpu(), true_scales, rtol=0, atol=0, equal_nan=True)


@on_a_device
@pytest.mark.usefixtures("rounds")
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_every_number_of_bfloat16_becomes_e4m3() -> None:
    """Ties, subnormal numbers, zeros of both signs; in rows whose scale is 1, that of zeros, and some that are not."""
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
    every = every[every.abs() <= 448]
    rows = torch.nn.functional.pad(every, (0, -len(every) % 1023)).view(-1, 1023)
    x = torch.cat([torch.cat([rows, torch.full((len(rows), 1), 448.0)], dim=1), rows.new_zeros(1, 1024)])
    tiny = torch.tensor([1.4, 1.5, 0.3, -1.4]).view(4, 1) * 448 * 2.0**-149 * torch.linspace(-1, 1, 64)
    special = torch.tensor([[1.0, torch.inf, -2.0], [0.0, 2.0**-149, -0.0], [1.0, torch.nan, -torch.inf]])
    huge = torch.tensor([3e38, 1e25, 1e-25]).view(3, 1) * torch.linspace(-1, 1, 64)
    for given in (x.float(), tiny, huge, special):
        check_fp8(launch_elementwise.to_fp8(given.to(DEVICE)), given)


@on_a_device
@pytest.mark.usefixtures("rounds")
def test_numbers_beside_ties_become_e4m3() -> None:
    """Of scales of any number of bits: of a quotient that was not rounded as a division's, some would be on the other
    side."""
    middles = (torch.arange(17, 33, 2) * 2.0 ** torch.arange(-8, 4)[:, None]).flatten()
    middles = middles[middles < 440]
    largest_N1 = 448 * (1 + torch.rand(64, 1, generator=torch.Generator().manual_seed(0)))
    ties = middles * (largest_N1 / torch.tensor([448.0]))
    up, down = (ties.nextafter(torch.tensor(to)) for to in (torch.inf, 0.0))
    x = torch.cat([largest_N1, ties, up, down], dim=1)
    check_fp8(launch_elementwise.to_fp8(x.to(DEVICE)), x)


@on_a_device
def test_operations_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is trained does not."""
    if INTERPRETED:
        monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
        monkeypatch.setattr(Tensor, "is_cuda", True)
        monkeypatch.setitem(common.GPUS, torch.device("cpu"), common.Gpu(80, multiprocessors=8))
        for operation in (norm, rope, swiglu):
            monkeypatch.setattr(operation, "unsupported_reason", lambda *tensors: "there is a GPU")
    launches = []

    def counted(kernel: object, *arguments: object, **sizes: object) -> None:
        launches.append(kernel)

    monkeypatch.setattr(common, "launch", counted)
    x_ND, weight_D = drawn(2, 64), drawn(64)

    def all_of_them() -> None:
        norm.rms_norm(x_ND, weight_D, 1e-5)
        rope.apply_rope(x_ND.view(2, 2, 32), x_ND.view(2, 2, 32), None, 1e-5, None)
        swiglu.swiglu(*x_ND.chunk(2, dim=-1))
        fp8.to_fp8(x_ND, torch.float32)
        fp8.swiglu_to_fp8(*x_ND.chunk(2, dim=-1))

    all_of_them()
    assert len(launches) == 5
    x_ND.requires_grad_()
    all_of_them()
    assert len(launches) == 5
    with torch.no_grad():
        all_of_them()
    assert len(launches) == 10


def _at_scouts_sizes() -> dict[str, Callable[[], object]]:
    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x_ND, weight_D = tensor(7, 5120, dtype=torch.float32), tensor(5120)
    rows_N1 = tensor(7, 1, dtype=torch.int64)
    q_NHC, k_NKC, rotation = tensor(7, 40, 128), tensor(7, 8, 128), tensor(7, 64, dtype=torch.complex64)
    patches_NHC, rotation_of_patches = tensor(34, 16, 88), tensor(17, 44, dtype=torch.complex64)
    return {
        "norm": lambda: launch_elementwise.rms_norm(x_ND, weight_D, 1e-5),
        "sum and norm": lambda: launch_elementwise.add_rms_norm(x_ND, tensor(7, 5120), weight_D, 1e-5),
        "sum of experts": lambda: launch_elementwise.add_rms_norm(
            x_ND, tensor(7, 5120), weight_D, 1e-5, tensor(7, 5120), rows_N1
        ),
        "rope": lambda: launch_elementwise.apply_rope(q_NHC, k_NKC, rotation, 1e-5, None),
        "temperature": lambda: launch_elementwise.apply_rope(q_NHC, k_NKC, None, None, tensor(7, dtype=torch.float32)),
        "patches": lambda: launch_elementwise.apply_rope(patches_NHC, patches_NHC, rotation_of_patches, None, None),
        "swiglu": lambda: launch_elementwise.swiglu(*tensor(7, 2 * 8192).chunk(2, dim=-1)),
        "e4m3": lambda: launch_elementwise.to_fp8(tensor(7, 5120)),
        "swiglu in e4m3": lambda: launch_elementwise.swiglu_to_fp8(*tensor(7, 2 * 8192).chunk(2, dim=-1)),
    }


@needs_the_compiler
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an A100 and an H100, at Scout's sizes."""
    compiled = compile_only(capability, monkeypatch, tmp_path)
    for name, launched in _at_scouts_sizes().items():
        launched()
        assert compiled[-1].asm["cubin"], name
        assert compiled[-1].metadata.shared <= 48 * 1024, name
    assert len(compiled) == len(_at_scouts_sizes())
