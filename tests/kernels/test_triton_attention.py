"""The Triton kernels for attention in a step of decoding: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4.cache.formats import CacheFormat, resolve_format
from llama4.cache.layer import LayerCache
from llama4.config import CACHE_BLOCK, TextConfig
from llama4.kernels.triton import launch_attention, support
from llama4.model.multimodal import Llama4Model
from llama4.ops import attention_gpu
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
pytestmark = pytest.mark.usefixtures("bfloat16_in_the_interpreter", "launches_in_the_interpreter")

ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the largest number: probabilities and results are rounded to the dtype, sums are float32."""


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def format_of(kind: str) -> CacheFormat:
    return resolve_format(kind, torch.float64)


def make_cache(kind: str, heads: int, head_dim: int, lengths: list[int], dtype: torch.dtype) -> LayerCache:
    """Random keys and values, and behind them what is no number."""
    config = TextConfig(num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim)
    cache = LayerCache(len(lengths), config, format_of(kind), torch.device(DEVICE))
    torch.manual_seed(sum(lengths))
    for row, length in reversed(list(enumerate(lengths))):
        keys, values = torch.randn(2, length, heads, head_dim, device=DEVICE).to(dtype)
        cache.write(row, 0, 2 * keys, values)
        stored, scales = cache.parts(cache.rows[row][-1])
        if length % CACHE_BLOCK:
            stored.view(torch.uint8)[:, :, length % CACHE_BLOCK :] = 0xFF  # NaN in all floats
            if scales is not None:
                scales[:, :, length % CACHE_BLOCK :] = torch.nan
    return cache


def attention(q_BHC: Tensor, cache: LayerCache, lengths: list[int]) -> Tensor:
    """In float64."""
    outs = []
    for row, (q_HC, length) in enumerate(zip(q_BHC.double(), lengths, strict=True)):
        parts = list(cache.read(row, length, torch.float64, q_BHC.device))
        group = q_HC.shape[0] // cache.heads
        keys, values = (torch.cat(each, dim=1).repeat_interleave(group, dim=0) for each in zip(*parts, strict=True))
        scores_HS = (keys @ q_HC[..., None])[..., 0] * q_HC.shape[1] ** -0.5
        outs.append((scores_HS.softmax(-1)[:, None] @ values)[:, 0])
    return torch.stack(outs)


def check(
    kind: str, lengths: list[int], dtype: torch.dtype = torch.bfloat16, heads: int = 2, group: int = 5, C: int = 128
) -> None:
    cache = make_cache(kind, heads, C, lengths, dtype)
    q = torch.randn(len(lengths), 2 * heads * group + 1, C, device=DEVICE).to(dtype)[:, 1 : 1 + heads * group]
    lengths_B = torch.tensor(lengths, device=DEVICE, dtype=torch.int32 if heads % 2 else torch.int64)
    out = launch_attention.attend(q, cache.block_table().to(DEVICE), lengths_B, heads, kind)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    truth = attention(q, cache, lengths)
    assert (out - truth).abs().max() / truth.abs().max() < ERROR[dtype]


@on_a_device
@pytest.mark.parametrize("kind", launch_attention.KINDS)
def test_attend(kind: str) -> None:
    check(kind, [3, 700, 64, 1])


@on_a_device
@pytest.mark.parametrize("length", [1, 256, 257])
@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_a_row_alone(kind: str, length: int) -> None:
    """Of one token, most shares have nothing to do."""
    check(kind, [length])


@on_a_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", launch_attention.KINDS)
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    check(kind, [130, 20], dtype)


@on_a_device
@pytest.mark.parametrize(("heads", "group", "C"), [(1, 1, 64), (3, 8, 64), (2, 17, 128), (2, 2, 80), (1, 4, 16)])
@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_shapes_of_heads(kind: str, heads: int, group: int, C: int) -> None:
    check(kind, [130, 20], heads=heads, group=group, C=C)


@on_a_device
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_many_rows_have_one_share(kind: str) -> None:
    assert launch_attention.num_splits(2 * 300, torch.device(DEVICE)) == 1
    check(kind, [1 + 7 * row % 90 for row in range(300 if DEVICE == "cuda" else 20)])


@on_a_device
def test_a_table_may_be_wider_than_the_rows() -> None:
    lengths = [70, 300]
    cache = make_cache("float32", 2, 64, lengths, torch.float32)
    table = torch.full((2, 50), -1, device=DEVICE)[:, :40]
    table[:, :2] = cache.block_table()
    q = torch.randn(2, 4, 64, device=DEVICE)
    out = launch_attention.attend(q, table, torch.tensor(lengths, device=DEVICE), 2, "float32")
    assert torch.allclose(out.double(), attention(q, cache, lengths), atol=1e-5)


@on_a_device
@pytest.mark.parametrize("kind", launch_attention.KINDS)
def test_write_and_attend(kind: str) -> None:
    """In one launch, wherever the new token's slot is: the same as in two."""
    lengths, slots, heads, C = [1, 64, 257, 300], [0, 63, 256, 17], 2, 64
    cache, other = (make_cache(kind, heads, C, lengths, torch.bfloat16) for _ in range(2))
    q = torch.randn(len(lengths), 3 * heads, C, device=DEVICE).bfloat16()
    k, v = torch.randn(2, len(lengths), heads, C, device=DEVICE).bfloat16()
    lengths_B, slots_B = torch.tensor(lengths, device=DEVICE), torch.tensor(slots, device=DEVICE)
    out = attention_gpu.write_and_attend(q, k, v, cache.block_table(), slots_B, lengths_B, cache.format)
    attention_gpu.write_step(k, v, other.block_table(), slots_B, cache.format)
    truth = attention_gpu.decode_attention(q, other.block_table(), lengths_B, heads, cache.format)
    assert torch.equal(out, truth)
    for ours, theirs in zip(cache.rows, other.rows, strict=True):
        assert all(map(torch.equal, ours, theirs))


def awkward(x: Tensor) -> Tensor:
    """Zeros, equal magnitudes of both signs, and numbers halfway between two values."""
    C = x.shape[-1]
    x[0, 0] = 0
    x[0, 1] = torch.tensor([1.0, -1.0]).repeat(C // 2)
    x[1, 0] = -x[0, 1]
    x[1, 1] = torch.arange(C) - C / 2 + 0.5
    x[1, 1, 0] = 127
    x[2, 0] = torch.linspace(-448, 448, C)
    x[2, 1] = 448 * 2.0 ** -torch.arange(C)
    return x


@on_a_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", launch_attention.KINDS)
def test_write(kind: str, dtype: torch.dtype) -> None:
    """The bits that `LayerCache.write` writes, and nothing else."""
    slots, heads, C = [0, 255, 256, 517, 100], 2, 64
    cache, other = (make_cache(kind, heads, C, [slot + 1 for slot in slots], dtype) for _ in range(2))
    torch.manual_seed(0)
    k, v = (3 * torch.randn(2, len(slots), 3 * heads, C, device=DEVICE)).to(dtype)[:, :, 1::3]
    awkward(k)
    awkward(v[1:])
    assert not k.is_contiguous()
    table = cache.block_table().to(DEVICE)
    launch_attention.write(k, v, table, torch.tensor(slots, device=DEVICE), kind)
    for row, slot in enumerate(slots):
        other.fill(row, slot, k[row : row + 1], v[row : row + 1])
        for ours, theirs in zip(cache.rows[row], other.rows[row], strict=True):
            assert torch.equal(ours, theirs)


@on_a_device
@pytest.mark.parametrize(("first", "new"), [(0, 1), (1, 3), (250, 20)])
@pytest.mark.parametrize("kind", launch_attention.KINDS)
def test_write_run(kind: str, first: int, new: int) -> None:
    """The same of many tokens of one row, across the end of a block."""
    cache, other = (make_cache(kind, 2, 64, [5, first + new], torch.bfloat16) for _ in range(2))
    k, v = (3 * torch.randn(2, new, 6, 64, device=DEVICE)).bfloat16()[:, :, 1::3]
    attention_gpu.write_run(k, v, cache.block_table()[1], first, cache.format)
    other.fill(1, first, k, v)
    for ours, theirs in zip(cache.rows, other.rows, strict=True):
        assert all(map(torch.equal, ours, theirs))


@on_a_device
@pytest.mark.parametrize("at", [3, 40])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", launch_attention.KINDS)
def test_write_what_is_not_finite(kind: str, number: float, at: int) -> None:
    """What `LayerCache.write` makes of it: where a scale is of all numbers of a head, all of them are NaN."""
    cache, other = (make_cache(kind, 2, 64, [4], torch.float32) for _ in range(2))
    k, v = torch.randn(2, 1, 2, 64, device=DEVICE)
    k[0, 0, at] = v[0, 1, at] = number
    launch_attention.write(k, v, cache.block_table().to(DEVICE), torch.tensor([3], device=DEVICE), kind)
    other.fill(0, 3, k, v)
    for ours, theirs in zip(*(next(each.read(0, 4, torch.float64, k.device)) for each in (cache, other)), strict=True):
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
        assert not theirs.isfinite().all()


@on_a_device
@pytest.mark.parametrize(("window", "cache_dtype"), [("chunks", "int8"), ("ring", "auto")])
def test_steps(window: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model, past the end of a chunk, of a block and of a ring: as without the kernels."""
    config = small_model.with_two_layers(small_model.config())
    prompt = 254 if window == "chunks" else 298
    if window == "ring":
        config = replace(config, text=replace(config.text, attention_chunk_size=None, sliding_window=300))
    model = Llama4Model(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(DEVICE)
    ids = torch.randint(0, small_model.RANKS, (2, prompt + 4), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones(2, prompt, dtype=torch.bool, device=DEVICE)
    mask[1, :2] = False  # one row ends a block or a ring before the other

    if not INTERPRETED:
        support.unsupported_reason(ids.device, torch.float32)  # tries the kernel, too
    attend, calls = launch_attention.attend, 0

    def counted(q_BHC: Tensor, table_BW: Tensor, lengths_B: Tensor, heads: int, kind: str) -> Tensor:
        nonlocal calls
        calls += 1
        return attend(q_BHC, table_BW, lengths_B, heads, kind)

    monkeypatch.setattr(launch_attention, "attend", counted)

    @torch.inference_mode()
    def logits(reason: str | None) -> Tensor:
        if INTERPRETED or reason:
            monkeypatch.setattr(attention_gpu, "unsupported_reason", lambda *args: reason)
        cache = model.new_cache(2, cache_dtype)
        model(ids[:, :prompt], cache=cache, attention_mask=mask)
        other = cache.fork()
        steps = [model(ids[:, i : i + 1], cache=cache) for i in range(prompt, prompt + 4)]
        return torch.cat([*steps, model(ids[:, :1], cache=other)], dim=1)

    assert torch.allclose(logits(None), logits("not now"), atol=1e-4)
    assert calls == 5 * config.text.num_hidden_layers


@needs_the_interpreter
def test_in_the_interpreter() -> None:
    run_again(__file__)


@needs_the_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", launch_attention.KINDS)
def test_compiles(kind: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For an A100 and an H100, at Scout's sizes."""
    compiled = compile_only(capability, monkeypatch, tmp_path)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    q, k = (torch.empty(2, heads, 128, dtype=dtype, device="meta") for heads in (40, 8))
    table, lengths = (torch.empty(*shape, dtype=torch.int64, device="meta") for shape in ((2, 32), (2,)))
    launch_attention.write(k, k, table, lengths, kind)
    launch_attention.write_run(k, k, table[0], 5, kind)
    launch_attention.attend(q, table, lengths, 8, kind)
    launch_attention.attend(q, table, lengths, 8, kind, (k, k, lengths))
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 99 * 1024, "what the smallest of GPUs has"
    assert [kernel.metadata.name for kernel in compiled] == ["write", "write", *2 * ["attend", "combine"]]
