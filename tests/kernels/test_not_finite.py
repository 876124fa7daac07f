"""NaN and infinity: what comes of them is what float64 gives, and other rows keep their bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.cache.formats import QUANTIZED, resolve_format
from llama4.cache.layer import LayerCache
from llama4.config import TextConfig
from llama4.kernels import cpu
from llama4.quantization.int4 import RANGES, quantize_groups
from tests.marks import needs_kernels

pytestmark = needs_kernels
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [None, *QUANTIZED]
NUMBERS = [torch.nan, torch.inf, -torch.inf]
C, K = 64, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nan_of_all_bits(dtype: torch.dtype, sign: int) -> Tensor:
    """That of which all bits are ones, but for the sign."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return torch.tensor(-1 if sign else torch.iinfo(bits).max, dtype=bits).view(dtype)


def attention(q_HC: Tensor, keys_KSC: Tensor, values_KSC: Tensor) -> Tensor:
    """One query that sees all keys, in float64."""
    H = len(q_HC)
    keys, values = (x.double().repeat_interleave(H // K, dim=0) for x in (keys_KSC, values_KSC))
    weights_HS = (torch.einsum("hc,hsc->hs", q_HC.double(), keys) * C**-0.5).softmax(-1)
    return torch.einsum("hs,hsc->hc", weights_HS, values)


def same(ours: Tensor, truth: Tensor) -> bool:
    """NaN and infinity where the truth has them; beside them, as numbers are rounded."""
    finite, dtype = truth.isfinite(), ours.dtype
    error = (ours.double() - truth)[finite].abs()
    return bool(
        torch.equal(ours[~finite].double().nan_to_num(3.0), truth[~finite].nan_to_num(3.0))
        and (error <= (2e-6 if dtype == torch.float32 else 2e-2) * truth[finite].abs().clamp(min=1)).all()
    )


def cache_of(format: str | None, dtype: torch.dtype, *parts: Tensor) -> tuple[LayerCache, Tensor, Tensor]:
    """Rows with these keys and values, [S, K, C], and what is read of them, each [rows, K, S, C]."""
    config = TextConfig(num_key_value_heads=K, head_dim=C)
    rows = len(parts) // 2
    cache = LayerCache(rows, config, resolve_format(format, dtype), torch.device("cpu"))
    held = []
    for row in range(rows):
        cache.write(row, 0, *parts[2 * row : 2 * row + 2])
        read = cache.read(row, len(parts[2 * row]), torch.float32, torch.device("cpu"))
        held.append([torch.cat(both, dim=1) for both in zip(*read, strict=True)])
    keys, values = (torch.stack(each) for each in zip(*held, strict=True))
    return cache, keys, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 5])
class TestAttention:
    """Of prompts, whole and in pieces, and of one token per row."""

    @pytest.mark.parametrize("past", [0, 300])
    @pytest.mark.parametrize("new", [1, 9, 70])
    def test_a_query(self, new: int, past: int, group: int, dtype: torch.dtype) -> None:
        """Its own head is NaN, and no number else changes a bit."""
        q, k, v = (normal(new, heads, C, seed=heads).to(dtype) for heads in (K * group, K, K))
        cache, _, _ = cache_of(None, dtype, *(normal(300, K, C, seed=seed).to(dtype) for seed in (5, 6)))

        def attend(q: Tensor) -> Tensor:
            return cpu.attend_causal(q, k, v, cache.block_addresses(0), past, "unquantized")

        def step(q: Tensor) -> Tensor:
            return cpu.attend(q[:1], cache.block_table(), torch.tensor([300]), K, "unquantized")

        for function, n in ((attend, new // 2), (step, 0)):
            before = function(q)
            for number in [*map(torch.tensor, NUMBERS), *(nan_of_all_bits(dtype, sign) for sign in (0, 1))]:
                strange = q.clone()
                strange[n, -1, 3] = number
                after = function(strange)
                assert after[n, -1].isnan().all(), number
                after[n, -1] = before[n, -1]
                assert torch.equal(after, before), number
            assert function(torch.full_like(q, torch.nan)).isnan().all()

    @pytest.mark.parametrize("number", [*NUMBERS, 1e30, 1e37])
    @pytest.mark.parametrize(("new", "past"), [(1, 0), (9, 0), (70, 0), (70, 300), (300, 0)])
    @pytest.mark.parametrize("of_values", [False, True], ids=["key", "value"])
    def test_a_new_key_or_value(
        self, of_values: bool, new: int, past: int, number: float, group: int, dtype: torch.dtype
    ) -> None:
        """Tokens before it do not change a bit, nor do other heads."""
        q, k, v = (normal(new, heads, C, seed=heads).to(dtype) for heads in (K * group, K, K))
        old_k, old_v = (normal(300, K, C, seed=seed).to(dtype) for seed in (5, 6))
        cache, _, _ = cache_of(None, dtype, old_k, old_v)
        before = cpu.attend_causal(q, k, v, cache.block_addresses(0), past, "unquantized")
        at = new // 2
        (v if of_values else k)[at, 1, 3] = number
        after = cpu.attend_causal(q, k, v, cache.block_addresses(0), past, "unquantized")
        assert torch.equal(after[:at], before[:at])
        assert torch.equal(after[:, :group], before[:, :group])
        keys, values = (torch.cat((old[:past], x)).transpose(0, 1) for old, x in ((old_k, k), (old_v, v)))
        for n in {at, new - 1}:
            assert same(after[n], attention(q[n], keys[:, : past + n + 1], values[:, : past + n + 1]))

    @pytest.mark.parametrize("number", NUMBERS)
    @pytest.mark.parametrize("format", FORMATS, ids=str)
    @pytest.mark.parametrize("of_values", [False, True], ids=["key", "value"])
    def test_a_cached_key_or_value(
        self, of_values: bool, format: str | None, number: float, group: int, dtype: torch.dtype
    ) -> None:
        """Other rows and heads do not change a bit. One scale of all numbers of a head makes all of them NaN."""
        lengths, at = [300, 17], 15
        parts = [normal(lengths[i // 2], K, C, seed=i).to(dtype) for i in range(4)]
        parts[1 if of_values else 0][at, 1, 3] = number
        clean = [x.nan_to_num(0.0, 0.0, 0.0) for x in parts]
        steps, prompts = [], []
        q = normal(9, K * group, C, seed=9).to(dtype)
        new_k, new_v = (normal(9, K, C, seed=seed).to(dtype) for seed in (10, 11))
        for own in (clean, parts):
            caches = [cache_of(format, dtype, *own[i : i + 2]) for i in (0, 2)]
            table = torch.zeros(2, 2, dtype=torch.int64)
            for row, (cache, _, _) in enumerate(caches):
                addresses = cache.block_addresses(0)
                table[row, : len(addresses)] = addresses
            name = caches[0][0].format.name
            steps.append(cpu.attend(q[:2], table, torch.tensor(lengths), K, name))
            prompts.append(cpu.attend_causal(q, new_k, new_v, table[0], lengths[0], name))
        _, keys, values = caches[0]
        assert same(steps[1][0], attention(q[0], keys[0], values[0]))
        assert torch.equal(steps[1][1], steps[0][1])
        assert torch.equal(steps[1][:, :group], steps[0][:, :group])
        both = [torch.cat((old[0], x.transpose(0, 1)), dim=1) for old, x in ((keys, new_k), (values, new_v))]
        assert same(prompts[1][-1], attention(q[-1], *both))
        assert torch.equal(prompts[1][:, :group], prompts[0][:, :group])

    def test_scores_of_minus_infinity(self, group: int, dtype: torch.dtype) -> None:
        """A block of them alone has no part in the rest; nothing but them is NaN."""
        q, k, v = (normal(300, heads, C, seed=heads).to(dtype) for heads in (K * group, K, K))
        q[..., 0], k[:, 1, 0] = 1, -torch.inf
        k[256:, 1, 0] = 1
        after = cpu.attend_causal(q, k, v, None, 0, "unquantized")
        assert after[:256, group:].isnan().all()
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        assert same(after[299], attention(q[299], keys, values))
        cache, _, _ = cache_of(None, dtype, k, v)
        for length in (256, 300):
            ours = cpu.attend(q[299:], cache.block_table(), torch.tensor([length]), K, "unquantized")
            assert same(ours[0], attention(q[299], keys[:, :length], values[:, :length]))


@pytest.mark.parametrize("dtype", DTYPES)
class TestSwiglu:
    def test_all_gates(self, dtype: torch.dtype) -> None:
        gates = [*NUMBERS, -1e30, -200.0, -100.0, -88.5, -87.0, -1.0, 0.0, 1.0, 88.0, 200.0, 1e30, 0.5, -0.5]
        gate_NF = torch.tensor([gates]).to(dtype)
        gate_NF = torch.cat((gate_NF, gate_NF.flip(1)))
        gate_NF[1, 0] = nan_of_all_bits(dtype, 0)
        for up in (1.0, 1e4, torch.inf, torch.nan, nan_of_all_bits(dtype, 1).item()):
            up_NF = torch.full_like(gate_NF, up)
            truth = F.silu(gate_NF) * up_NF if abs(up) == torch.inf else F.silu(gate_NF.double()) * up_NF.double()
            truth = torch.where(truth.abs() < 1e-30, 0, truth.double())  # -200 has a sigmoid of 0 in float32
            assert same(cpu.swiglu(gate_NF, up_NF), truth)

    def test_other_rows(self, dtype: torch.dtype) -> None:
        gate_NF, up_NF = normal(5, 320).to(dtype), normal(5, 320, seed=1).to(dtype)
        before = cpu.swiglu(gate_NF, up_NF)
        gate_NF[2, 7], up_NF[2, 300] = torch.nan, torch.nan
        after = cpu.swiglu(gate_NF, up_NF)
        assert after.isnan().nonzero().tolist() == [[2, 7], [2, 300]]
        assert torch.equal(after[~after.isnan()], before[~after.isnan()])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("dtype", DTYPES)
class TestNorms:
    def test_rms_norm(self, number: float, dtype: torch.dtype) -> None:
        x_ND, weight_D = normal(3, 64), normal(64, seed=1).to(dtype)
        before = cpu.rms_norm(x_ND, weight_D, 1e-5)
        x_ND[1, 5] = number
        after = cpu.rms_norm(x_ND, weight_D, 1e-5)
        x = x_ND[1].double()
        assert same(after[1], x * torch.rsqrt(x.square().mean() + 1e-5) * weight_D.double())
        assert torch.equal(after[::2], before[::2])

    def test_rope(self, number: float, dtype: torch.dtype) -> None:
        """A pair of them is turned; with a norm behind it the head is NaN or zero."""
        x_NHC, rotation = normal(3, 2, 64).to(dtype), torch.polar(torch.ones(3, 32), normal(3, 32, seed=1))
        for eps in (None, 1e-5):
            before = cpu.apply_rope(x_NHC, rotation, eps, None)
            strange = x_NHC.clone()
            strange[1, 1, 5] = number
            after = cpu.apply_rope(strange, rotation, eps, None)
            pairs = torch.view_as_real(torch.view_as_complex(strange[1, 1].double().view(32, 2)) * rotation[1])
            truth = pairs.flatten()
            if eps is not None:
                truth = truth * torch.rsqrt(truth.square().mean() + eps)
            assert same(after[1, 1], truth)
            after[1, 1] = before[1, 1]
            assert torch.equal(after, before)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_groups(number: float, dtype: torch.dtype) -> None:
    """The scale of the group is NaN, in torch too; other groups keep their bits."""
    weight_OI = normal(4, 128).to(dtype)
    before_packed, before_scale = cpu.quantize_int4(weight_OI, 32, RANGES)
    weight_OI[1, 40] = number
    packed, scale = cpu.quantize_int4(weight_OI, 32, RANGES)
    readable = quantize_groups(weight_OI.unflatten(-1, (-1, 32)), dtype)[1].squeeze(-1)
    assert scale.isnan().nonzero().tolist() == readable.isnan().nonzero().tolist() == [[1, 1]]
    packed[1, 4:8], scale[1, 1] = before_packed[1, 4:8], before_scale[1, 1]
    assert torch.equal(packed, before_packed)
    assert torch.equal(scale, before_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [0, 1])
def test_a_logit_of_any_nan(sign: int, dtype: torch.dtype) -> None:
    """By its log-probability the engine knows it."""
    logits_BV = normal(3, 1000).to(dtype)
    logits_BV[1, 500] = nan_of_all_bits(dtype, sign)
    assert cpu.greedy_token(logits_BV)[1].isnan().tolist() == [False, True, False]
    drawn = cpu.draw_token(logits_BV, [(row, 50, 0.7, 0.9, 0.01, 0.5) for row in range(3)])
    assert [logprob != logprob for _, logprob in drawn] == [False, True, False]
