"""The compiled kernels against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.cache.formats import QUANTIZED, CacheFormat, resolve_format
from llama4.cache.layer import LayerCache
from llama4.config import TextConfig
from llama4.kernels import abi, cpu, loader, threads
from llama4.ops import linear, quantized
from llama4.quantization.int4 import RANGES, pack, quantize_groups, unpack
from llama4.vision.rope import rotate
from tests.marks import needs_kernels

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 7, 8, 12, 13, 40, 75, 200]
"""Few go through registers by fours, more than twelve (in x out: eight) by tiles of ten to 24, from 192 on with other
panels."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, truth: Tensor) -> bool:
    """float32 rounds sums of hundreds of products to 1e-6 of the largest; bfloat16 rounds the result, by up to 2^-9 of
    itself, and the inputs of exponentials."""
    assert truth.dtype == torch.float64
    error = (ours.double() - truth).abs().max() / truth.abs().max()
    return bool(error < (2e-6 if ours.dtype == torch.float32 else 6e-3))


def linear_int4(x: Tensor, codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    weight, scale = (
        quantized.interleaved16(part, together).reshape(part.shape) for part, together in ((pack(codes), 4), (scale, 1))
    )
    return cpu.linear_quantized("int4", x, weight, scale, group_size)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
class TestProducts:
    """Four blocks of inputs go together, and 640 or 672 leave one or two; 1000 outputs end within a task of few rows'
    products, and 1056 are 33 strips of many rows'."""

    @pytest.fixture
    def outputs(self, rows: int) -> int:
        return 1000 if rows <= abi.MAX_GEMV_ROWS else 1056

    def test_dense(self, rows: int, dtype: torch.dtype) -> None:
        x, weight_OI, weight_IO = (normal(*s).to(dtype) for s in ((rows, 672), (1000, 672), (672, 1056)))
        assert close(cpu.linear(x, weight_OI), x.double() @ weight_OI.double().mT)
        assert close(cpu.linear_in_out(x, weight_IO), x.double() @ weight_IO.double())
        weight_OI = weight_IO.mT.contiguous()  # whole strips
        assert close(cpu.linear(x, weight_OI), x.double() @ weight_OI.double().mT)
        if rows <= abi.MAX_GEMV_ROWS:
            x, weight_IO = normal(rows, 645, seed=1).to(dtype), normal(645, 1024, seed=2).to(dtype)
            assert close(cpu.linear_in_out(x, weight_IO), x.double() @ weight_IO.double())

    def test_int8(self, rows: int, dtype: torch.dtype, outputs: int) -> None:
        x, scale = normal(rows, 640).to(dtype), normal(outputs, 1).bfloat16()
        codes = torch.randint(-128, 128, (outputs, 640), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        assert close(cpu.linear_quantized("int8", x, codes, scale), x.double() @ (codes.double() * scale.double()).mT)

    def test_fp8(self, rows: int, dtype: torch.dtype, outputs: int) -> None:
        x, scale = normal(rows, 512).to(dtype), normal(outputs, 1).bfloat16()
        codes = torch.arange(512 * outputs).view(outputs, 512).to(torch.uint8)
        codes[codes & 127 == 127] = 0  # not numbers; all others occur
        weight = codes.view(torch.float8_e4m3fn).double() * scale.double()
        x_scale = x.float().abs().amax(1, keepdim=True) / 448
        rounded = (x.float() / x_scale).to(torch.float8_e4m3fn).double() * x_scale.double()
        assert close(cpu.linear_quantized("fp8", x, codes, scale), rounded @ weight.mT)
        whole = cpu.linear_quantized("fp8", x, codes, scale)
        for value in (torch.nan, torch.inf, -torch.inf):  # the row's alone
            x[rows // 2, 300] = value
            y = cpu.linear_quantized("fp8", x, codes, scale)
            assert y[rows // 2].isnan().all()
            assert torch.equal(y[: rows // 2], whole[: rows // 2])

    @pytest.mark.parametrize(("inputs", "group_size"), [(576, 32), (576, 64), (576, 96), (768, 128), (768, 256)])
    def test_int4(self, rows: int, dtype: torch.dtype, inputs: int, group_size: int, outputs: int) -> None:
        outputs += -outputs % 16
        x, scale = normal(rows, inputs).to(dtype), normal(outputs, inputs // group_size).bfloat16()
        codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        weight = (codes.double().unflatten(1, (-1, group_size)) * scale.double()[..., None]).flatten(1)
        for scales in (scale, scale.float()):
            assert close(linear_int4(x, codes, scales, group_size), x.double() @ weight.mT)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [70, 648])
def test_tiles_of_any_height(inputs: int, dtype: torch.dtype) -> None:
    """Rows that fill one or more tiles, or leave some of them without any."""
    codes = torch.arange(96 * 576).view(96, 576).to(torch.uint8) & 63
    weight_OI = codes.view(torch.float8_e4m3fn).double()
    for rows in (*range(9, 26), 27, 45, 46, 49, 73):
        x, weight_IO = normal(rows, inputs).to(dtype), normal(inputs, 96, seed=1).to(dtype)
        assert close(cpu.linear_in_out(x, weight_IO), x.double() @ weight_IO.double()), rows
        x = normal(rows, 576, seed=2).to(dtype)
        assert close(cpu.linear(x, weight_OI.to(dtype)), x.double() @ weight_OI.mT), rows
        scales = torch.ones(96, 1, dtype=torch.bfloat16)
        x_scale = x.float().abs().amax(1, keepdim=True) / 448
        rounded = (x.float() / x_scale).to(torch.float8_e4m3fn).double() * x_scale.double()
        assert close(cpu.linear_quantized("fp8", x, codes, scales), rounded @ weight_OI.mT), rows


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), [(648, 992), (2048, 128), (16, 20_000)])
def test_several_rows(inputs: int, outputs: int) -> None:
    """Tiles of ten to 24 rows of float32, and one or two of them; inputs and columns that end within a panel."""
    for rows in range(9, 43):
        x, weight = normal(rows, inputs), normal(inputs, outputs, seed=1)
        assert close(cpu.linear_in_out(x, weight), x.double() @ weight.double())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("outputs", [7, 16, 51])
def test_long_rows(outputs: int, rows: int, dtype: torch.dtype) -> None:
    """8832 inputs are read in segments, of which the last is shorter, however few rows there are."""
    x, weight = normal(rows, 8832).to(dtype), normal(outputs, 8832, seed=1).to(dtype)
    assert close(cpu.linear(x, weight), x.double() @ weight.double().mT)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, (outputs, 8832), dtype=torch.int8, generator=generator)
    scale = normal(outputs, 1).bfloat16()
    assert close(cpu.linear_quantized("int8", x, codes, scale), x.double() @ (codes.double() * scale.double()).mT)
    codes, scale = codes.clamp(-8, 7).repeat_interleave(16, 0), normal(16 * outputs, 69).bfloat16()
    weight = (codes.double().unflatten(1, (69, 128)) * scale.double()[..., None]).flatten(1)
    assert close(linear_int4(x, codes, scale, 128), x.double() @ weight.mT)


@needs_kernels
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_that_is_no_number_spoils_its_own_output_alone(dtype: torch.dtype, rows: int, group_size: int) -> None:
    """Those of sixteen outputs are read at once."""
    codes = torch.randint(-8, 8, (48, 384), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    x, scale = normal(rows, 384).to(dtype), normal(48, 384 // group_size).bfloat16()
    truth = linear_int4(x, codes, scale, group_size)
    spoilt = [0, 5, 16, 39]
    scale[spoilt] = torch.inf
    ours = linear_int4(x, codes, scale, group_size)
    others = [i for i in range(48) if i not in spoilt]
    assert torch.equal(ours[:, others], truth[:, others])
    assert not ours[:, spoilt].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 128, 1024])
def test_rounding_to_four_bits(dtype: torch.dtype, group_size: int) -> None:
    """As `quantize_groups` does, but for ties and the order of sums."""
    weight = normal(512, 1024)
    weight[0], weight[1, 5], weight[2, 7] = 0, 30, -30
    weight = weight.to(dtype)
    assert not quantized.quantize_unsupported_reason(weight, group_size)
    groups = weight.unflatten(1, (-1, group_size))
    codes, scale = quantize_groups(groups, dtype)
    packed, own_scale = cpu.quantize_int4(weight, group_size, RANGES)
    own_codes = unpack(packed).unflatten(1, (-1, group_size))
    assert (own_codes == codes).double().mean() > 0.99
    errors = [
        (codes * scale[..., None] - groups.double()).square().sum(-1)
        for codes, scale in ((own_codes.double(), own_scale.double()), (codes.double(), scale[..., 0].double()))
    ]
    assert torch.allclose(errors[0].sum(), errors[1].sum(), rtol=1e-5)
    assert (errors[0] <= 1.01 * errors[1]).double().mean() > 0.999
    assert not own_codes[0].any()
    assert "whole groups" in (quantized.quantize_unsupported_reason(weight[:, :1000], group_size) or "")


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 50])
class TestElementwise:
    def test_rms_norm(self, rows: int, dtype: torch.dtype) -> None:
        x, weight = normal(rows, 528), normal(528, seed=1).to(dtype)
        out = cpu.rms_norm(x, weight, 1e-2)
        assert out.dtype == dtype
        assert close(out, F.rms_norm(x.double(), (528,), weight.double(), torch.tensor(1e-2).item()))

    @pytest.mark.parametrize("turned", [True, False])
    @pytest.mark.parametrize("eps", [None, 1e-2])
    @pytest.mark.parametrize("warm", [True, False])
    def test_turn(self, rows: int, dtype: torch.dtype, turned: bool, eps: float | None, warm: bool) -> None:
        x = normal(rows, 9 * 48).to(dtype)[:, :384].unflatten(1, (8, 48))  # rows apart, as parts of one product are
        rotation = torch.polar(torch.ones(rows, 24), normal(rows, 24, seed=1))
        factors = normal(rows, seed=2)
        truth = x.double()
        if turned:
            truth = rotate(truth, rotation.to(torch.complex128)[:, None])
        if eps is not None:
            truth = truth * torch.rsqrt(truth.square().mean(-1, keepdim=True) + eps)
        if warm:
            truth = truth * factors.double()[:, None, None]
        assert close(cpu.apply_rope(x, rotation if turned else None, eps, factors if warm else None), truth)

    def test_swiglu(self, rows: int, dtype: torch.dtype) -> None:
        gate, up = (100 * normal(rows, 2048)).to(dtype).chunk(2, dim=-1)  # to both ends of the exponential
        assert close(cpu.swiglu(gate, up), F.silu(gate.double()) * up.double())


def layer_cache(
    rows: int, lengths: list[int], format: CacheFormat, dtype: torch.dtype
) -> tuple[LayerCache, Tensor, Tensor]:
    """Two key heads of 64 for so many tokens, written in two goes; and what was kept of them, [rows, 2, S, 64]."""
    cache = LayerCache(rows, TextConfig(num_key_value_heads=2, head_dim=64), format, torch.device("cpu"))
    held = torch.zeros(2, rows, 2, max(lengths), 64, dtype=torch.float64)
    for row, length in enumerate(lengths):
        new = [normal(length, 2, 64, seed=seed + row).to(dtype) for seed in (1, 50)]
        half = length // 2
        cache.write(row, 0, *(x[:half] for x in new))
        cache.write(row, half, *(x[half:] for x in new))
        for keys, values in cache.read(row, length, torch.float64, torch.device("cpu")):
            held[:, row, :, :length] = torch.stack((keys, values))
    return cache, *held


def attention(q_NHC: Tensor, keys_KSC: Tensor, values_KSC: Tensor) -> Tensor:
    """The last of N queries sees all S keys, the one before it all but the last, ..., in float64."""
    (N, H, C), (K, S, _) = q_NHC.shape, keys_KSC.shape
    scores = torch.einsum("nkgc,ksc->nkgs", q_NHC.double().view(N, K, H // K, C), keys_KSC.double()) * C**-0.5
    ages = torch.arange(S - N, S)[:, None] - torch.arange(S)
    weights = scores.masked_fill(ages[:, None, None] < 0, -torch.inf).softmax(-1)
    return torch.einsum("nkgs,ksc->nkgc", weights, values_KSC.double()).reshape(N, H, C)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [None, *QUANTIZED], ids=str)
@pytest.mark.parametrize("group", [1, 2, 5, 8])
class TestAttention:
    @pytest.mark.parametrize("rows", [1, 3, 7])
    def test_one_token_per_row(self, rows: int, group: int, format: str | None, dtype: torch.dtype) -> None:
        """Rows of unequal length, over several blocks, behind which there is no number."""
        lengths = [1199, 1, 256, 257, 300, 1023, 64][:rows]
        cache, keys, values = layer_cache(rows, lengths, resolve_format(format, dtype), dtype)
        if format is None:
            cache.parts(cache.rows[0][-1])[0][:, :, 1199 % 256 :] = torch.nan
        q = 3 * normal(rows, 2 * group, 64).to(dtype)
        ours = cpu.attend(q, cache.block_table(), torch.tensor(lengths), 2, cache.format.name)
        for row, length in enumerate(lengths):
            truth = attention(q[row : row + 1], keys[row, :, :length], values[row, :, :length])
            assert close(ours[row : row + 1], truth)

    @pytest.mark.parametrize(("new", "past"), [(1, 0), (7, 300), (64, 256), (300, 511), (513, 10)])
    def test_many_tokens(self, new: int, past: int, group: int, format: str | None, dtype: torch.dtype) -> None:
        cache, keys, values = layer_cache(1, [max(past, 1)], resolve_format(format, dtype), dtype)
        q, k, v = (normal(new, heads, 64, seed=heads + 7).to(dtype) for heads in (2 * group, 2, 2))
        ours = cpu.attend_causal(3 * q, k, v, cache.block_addresses(0), past, cache.format.name)
        whole = (torch.cat((old[0, :, :past], x.transpose(0, 1)), dim=1) for old, x in ((keys, k), (values, v)))
        assert close(ours, attention(3 * q, *whole))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
class TestGreedyToken:
    @pytest.mark.parametrize(("rows", "vocabulary"), [(1, 512), (3, 1000), (2, 32_007), (4, 202_048)])
    def test_against_float64(self, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
        """In bfloat16 many are equal; the largest may stand anywhere, behind the last sixteen too."""
        logits = (5 * normal(rows, vocabulary)).to(dtype)
        logits[-1, -1] = 40
        ids, logprobs = cpu.greedy_token(logits)
        assert torch.equal(ids, logits.argmax(-1))
        truth = logits.double().log_softmax(-1).amax(-1)
        assert torch.allclose(logprobs.double(), truth, atol=2e-6, rtol=1e-6)

    def test_of_equals_the_first(self, dtype: torch.dtype) -> None:
        logits = normal(4, 1000).clamp(max=0.5).to(dtype)
        ids, _ = cpu.greedy_token(logits)
        assert ids.tolist() == [(row == 0.5).nonzero()[0].item() for row in logits]

    @pytest.mark.parametrize("strange", [torch.nan, torch.inf])
    @pytest.mark.parametrize("place", [0, 700, 999])
    def test_what_is_no_number_shows(self, place: int, strange: float, dtype: torch.dtype) -> None:
        logits = normal(2, 1000).to(dtype)
        logits[0, place] = strange
        ids, logprobs = cpu.greedy_token(logits)
        assert logprobs.isnan().tolist() == [True, False]
        assert 0 <= ids[0] < 1000
        assert ids[1] == logits[1].argmax()

    @pytest.mark.parametrize("allowed", [slice(0, 1), slice(300, 310), slice(999, 1000)])
    def test_what_is_forbidden_does_not_count(self, allowed: slice, dtype: torch.dtype) -> None:
        logits = torch.full((2, 1000), -torch.inf, dtype=dtype)
        logits[:, allowed] = normal(2, 1000).to(dtype)[:, allowed]
        ids, logprobs = cpu.greedy_token(logits)
        assert torch.equal(ids, logits.argmax(-1))
        assert torch.allclose(logprobs.double(), logits.double().log_softmax(-1).amax(-1), atol=2e-6, rtol=1e-6)


@needs_kernels
@pytest.mark.skipif(loader.library() is None or loader.found().level == "avx2", reason="AVX2 has too few registers")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [640, 4736])
def test_a_row_is_the_same_bits_in_any_company(inputs: int, dtype: torch.dtype) -> None:
    """Of up to 12 rows; in x out, of up to 8; dense, of up to 19: twice eight and some. Long rows are read in
    segments."""
    x, scale = normal(19, inputs).to(dtype), normal(96, 1).abs().bfloat16()
    codes = torch.randint(0, 120, (96, inputs), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    weight_OI, weight_IO = normal(96, inputs).to(dtype), normal(inputs, 96).to(dtype)
    fours = torch.randint(-8, 8, (96, inputs), generator=torch.Generator().manual_seed(1))
    scales = normal(96, inputs // 32).to(dtype)
    products: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": lambda x: cpu.linear(x, weight_OI),
        "int8": lambda x: cpu.linear_quantized("int8", x, codes, scale),
        "fp8": lambda x: cpu.linear_quantized("fp8", x, codes, scale),
        "int4": lambda x: linear_int4(x, fours, scales, 32),
        "in x out": lambda x: cpu.linear_in_out(x, weight_IO),
    }
    for name, product in products.items():
        alone = torch.cat([product(row[None]) for row in x])
        most = {"dense": 15 if loader.found().level == "amx" else 19, "in x out": 8}.get(name, 12)
        for rows in range(2, most + 1):
            for first in range(0, most - rows + 1, 3):
                part = slice(first, first + rows)
                assert torch.equal(product(x[part]), alone[part]), (name, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 40])
def test_any_number_of_threads(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the same bits. In x out, a few rows share the inputs in parts, and where threads are more than parts,
    the outputs, too. Out x in, threads share outputs, 32 at a time: 96 are three pieces, fewer than threads."""

    def products() -> Iterator[Tensor]:
        for inputs, outputs in ((1, 64), (7, 64), (100, 1024), (300, 4096), (2048, 2048)):
            x, weight = normal(rows, inputs).to(dtype), normal(inputs, outputs, seed=1).to(dtype)
            if rows < 9 or inputs % 32 == 0:
                yield cpu.linear_in_out(x, weight)
                assert close(cpu.linear_in_out(x, weight), x.double() @ weight.double())
        for outputs in (96, 1024, 4096):
            x, weight = normal(rows, 1024).to(dtype), normal(outputs, 1024, seed=1).to(dtype)
            yield cpu.linear(x, weight)
            assert close(cpu.linear(x, weight), x.double() @ weight.double().mT)

    alone = list(products())
    for count in (2, 3, 7, 20):
        monkeypatch.setenv(threads.VARIABLE, str(count))
        for _ in range(3):
            assert all(map(torch.equal, products(), alone))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 12, 13, 100])
def test_any_way_is_right(rows: int, dtype: torch.dtype) -> None:
    """What `dense` chooses, in both layouts, for small matrices and such as are worth a kernel."""
    for outputs, inputs in ((40, 24), (1024, 512)):
        x, weight = normal(rows, inputs).to(dtype), normal(outputs, inputs, seed=1).to(dtype)
        truth = x.double() @ weight.double().mT
        for out in (
            linear.linear(x, weight),
            linear.linear_in_out(x, weight.mT.contiguous()),
            linear.linear_in_out(x, weight.mT),
        ):
            assert out.dtype == dtype
            assert out.shape == truth.shape
            assert not rows or (out.double() - truth).abs().max() < 1e-2 * truth.abs().max()


def test_gradients_go_through() -> None:
    x, weight = normal(2, 512).requires_grad_(), normal(1024, 512, seed=1).requires_grad_()
    linear.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(2, -1), atol=1e-4)
    weight.grad = None
    linear.linear_in_out(x.detach(), weight.mT).sum().backward()
    assert weight.grad is not None
