"""Grouped-query attention without a mask: parts of it, merged by their log-sum-exp.

Nothing here is of size N x S, however long either is.

Shapes: N new tokens of one sequence, B sequences, H query heads, K key/value heads, C head_dim, S keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.cache.formats import CacheFormat, Unquantized
from llama4.config import CACHE_BLOCK
from llama4.config.window import SlidingWindow, slot_of
from llama4.kernels import abi, cpu, loader
from llama4.ops import attention_gpu, cpu_kernels
from llama4.ops.precision import upcast

QUERIES = 256
"""Queries that meet a past at once where that is done in plain torch: bounds the memory of the scores."""


class KeyValueBlocks(Protocol):
    """The keys and values of one layer, in blocks, as a cache holds them."""

    format: CacheFormat
    heads: int
    device: torch.device

    def read(self, row: int, slots: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `slots` slots of a row, some thousands at a time: keys and values, each [K, S, C]."""

    def block_table(self) -> Tensor:
        """Addresses of the blocks of every row, [B, blocks], zeros behind the last; on the device of the blocks."""

    def block_addresses(self, row: int) -> Tensor:
        """Addresses of the blocks of one row."""

    def fill(self, row: int, begin: int, keys_NKC: Tensor, values_NKC: Tensor) -> None:
        """Write to slots from `begin` on, whose blocks are there and the row's own."""


def softmax_attention(q_HNC: Tensor, k_KSC: Tensor, v_KSC: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q K^T / sqrt(C)) V, [H, N, C], and the logarithm of the softmax's denominator, [H, N].

    Causal: query i sees keys 0 to i.
    """
    takes_flash = not flash_unsupported_reason(q_HNC)
    if takes_flash and q_HNC.is_cuda and torch.version.hip is None:
        k_HSC, v_HSC = k_KSC, v_KSC  # this operator finds the key head of a query head
    else:
        group = q_HNC.shape[0] // k_KSC.shape[0]
        k_HSC, v_HSC = (x.repeat_interleave(group, dim=0) for x in (k_KSC, v_KSC))
    if takes_flash:
        flash = _FLASH[q_HNC.device.type]
        out_1HNC, lse_1HN = flash(q_HNC[None], k_HSC[None], v_HSC[None], 0.0, causal)[:2]
        return out_1HNC[0], lse_1HN[0]
    outs, lses = [], []
    for i, q in enumerate(q_HNC.split(QUERIES, dim=1)):
        scores = upcast(q) @ upcast(k_HSC).mT * q.shape[2] ** -0.5
        if causal:
            query_N1 = torch.arange(i * QUERIES, i * QUERIES + q.shape[1], device=q.device)[:, None]
            scores = scores.masked_fill(query_N1 < torch.arange(k_HSC.shape[1], device=q.device), -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(((scores - lses[-1][..., None]).exp() @ upcast(v_HSC)).type_as(q))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def flash_unsupported_reason(q_HNC: Tensor) -> str | None:
    """Why torch's flash attention does not take queries; None if it does."""
    if reason := flash_absent_reason(q_HNC.device.type, q_HNC.dtype, q_HNC.shape[2]):
        return reason
    return "its operator below autograd has no gradient" if torch.is_grad_enabled() else None


def flash_absent_reason(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch has no flash attention for such queries, without gradients; None if it has."""
    if dtype not in _FLASH_DTYPES.get(device_type, ()):
        return f"there is none for {dtype} on {device_type}"
    if device_type == "cuda" and (head_dim % 8 or head_dim > 256):
        return "the head dimension is no multiple of 8 up to 256"
    return None


_FLASH: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    "cuda": torch.ops.aten._scaled_dot_product_flash_attention,
}
_FLASH_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}


def merge(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over the union of several sets of keys, from the attention over each as `softmax_attention` returns it:
    the average of the outputs, weighted by the denominators."""
    (out, lse), *rest = parts
    for other, other_lse in rest:
        both = torch.logaddexp(lse, other_lse)
        out = upcast(out) * (lse - both).exp()[..., None] + upcast(other) * (other_lse - both).exp()[..., None]
        lse = both
    return out


def causal_attention(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cache: KeyValueBlocks | None = None, row: int = 0, past: int = 0
) -> Tensor:
    """New tokens of one sequence see each other causally, and all of the first `past` tokens of a row of the cache.

    Returns:
        [N, H, C]; the softmax scale is C^-0.5.
    """
    if not past:
        cache = None
    format = cache.format if cache is not None else Unquantized(q_NHC.dtype)
    if not unsupported_reason(q_NHC, past + len(q_NHC), format):
        blocks = cache.block_addresses(row) if cache is not None else None
        return cpu.attend_causal(q_NHC, k_NKC, v_NKC, blocks, past, format.name)
    q_HNC, k_KNC, v_KNC = (x.transpose(0, 1) for x in (q_NHC, k_NKC, v_NKC))
    if cache is None:
        q, k, v = q_HNC[None], k_KNC[None], v_KNC[None]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    new = softmax_attention(q_HNC, k_KNC, v_KNC, causal=True)
    spans = cache.read(row, past, q_HNC.dtype, q_HNC.device)
    old = (softmax_attention(q_HNC, k, v, causal=False) for k, v in spans)
    return merge(itertools.chain([new], old)).type_as(q_NHC).transpose(0, 1)


def sliding_attention(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    window: int,
    cache: KeyValueBlocks | None = None,
    row: int = 0,
    before: int = 0,
) -> Tensor:
    """New tokens of one sequence each see themselves and the `window - 1` tokens before them, of which a row of the
    cache holds the last `window` in a ring (see config/window.py).

    Of some queries at once, the keys are those that all see, their own, seen causally, and as many at the far edge of
    the window, of which the first query sees all and each that follows one less: the same triangle, read backwards.

    Args:
        before: tokens of the sequence before the new ones.

    Returns:
        [N, H, C]; the softmax scale is C^-0.5.
    """
    N, held = len(q_NHC), min(before, window) if cache is not None else 0
    if held + N <= window:
        return causal_attention(q_NHC, k_NKC, v_NKC, cache, row, held)
    q_HNC, k_KSC, v_KSC = (x.transpose(0, 1) for x in (q_NHC, k_NKC, v_NKC))
    if cache is not None and held:
        kept = zip(*cache.read(row, held, q_NHC.dtype, q_NHC.device), strict=True)
        turn = slot_of(before, SlidingWindow(window)) if held == window else 0
        old = (torch.cat(parts, dim=1).roll(-turn, dims=1) for parts in kept)
        k_KSC, v_KSC = (torch.cat(both, dim=1) for both in zip(old, (k_KSC, v_KSC), strict=True))

    def attend(q: Tensor, keys: slice, causal: bool = False, backwards: bool = False) -> tuple[Tensor, Tensor]:
        k, v = k_KSC[:, keys], v_KSC[:, keys]
        if not backwards:
            return softmax_attention(q, k, v, causal)
        out, lse = softmax_attention(q.flip(1), k.flip(1), v.flip(1), causal)
        return out.flip(1), lse.flip(1)

    outs, at = [], held  # the place of a query's own key
    while at < held + N:
        end = min(held + N, window if at < window else at + max(window - 1, 1))
        q, edge = q_HNC[:, at - held : end - held], max(0, end - window)
        parts = [attend(q, slice(at, end), causal=True)]
        if edge and window > 1:
            parts.append(attend(q, slice(edge - (end - at) + 1, edge + 1), causal=True, backwards=True))
        if (seen := slice(edge + 1 if edge else 0, at)).start < at:
            parts.append(attend(q, seen))
        outs.append(merge(parts).type_as(q_NHC))
        at = end
    return torch.cat(outs, dim=1).transpose(0, 1)


def decode_attention(q_BHC: Tensor, cache: KeyValueBlocks, lengths: Sequence[int], lengths_B: Tensor) -> Tensor:
    """One query per sequence against the first `lengths` tokens of its row of the cache, its own key included.

    Args:
        lengths: on the host.
        lengths_B: the same, int64, on the device.

    Returns:
        [B, H, C]; the softmax scale is C^-0.5.
    """
    if not unsupported_reason(q_BHC, max(lengths), cache.format):
        return cpu.attend(q_BHC, cache.block_table(), lengths_B, cache.heads, cache.format.name)
    if not gpu_unsupported_reason(q_BHC, cache):
        return attention_gpu.decode_attention(q_BHC, cache.block_table(), lengths_B, cache.heads, cache.format)
    outs = []
    for row, (q_HC, length) in enumerate(zip(q_BHC, lengths, strict=True)):
        spans = cache.read(row, length, q_HC.dtype, q_HC.device)
        outs.append(merge(softmax_attention(q_HC[:, None], k, v, causal=False) for k, v in spans)[:, 0])
    return torch.stack(outs).type_as(q_BHC)


def write_step(
    k_BKC: Tensor, v_BKC: Tensor, cache: KeyValueBlocks, slots: Sequence[int], slots_B: Callable[[], Tensor]
) -> None:
    """Write the key and value of one new token per sequence into a slot of its row of the cache, whose block is there
    and the row's own.

    Args:
        slots: on the host.
        slots_B: gives the same, int64, on the device, where a kernel wants them there.
    """
    if not gpu_unsupported_reason(k_BKC, cache):
        attention_gpu.write_step(k_BKC, v_BKC, cache.block_table(), slots_B(), cache.format)
        return
    for row, slot in enumerate(slots):
        cache.fill(row, slot, k_BKC[row : row + 1], v_BKC[row : row + 1])


def write_run(k_NKC: Tensor, v_NKC: Tensor, cache: KeyValueBlocks, row: int, first: int) -> None:
    """Write the keys and values of new tokens of one sequence to its row's slots from `first` on, whose blocks are
    there and the row's own."""
    if not gpu_unsupported_reason(k_NKC, cache):
        attention_gpu.write_run(k_NKC, v_NKC, cache.block_table()[row], first, cache.format)
    else:
        cache.fill(row, first, k_NKC, v_NKC)


def unsupported_reason(q_NHC: Tensor, keys: int, format: CacheFormat) -> str | None:
    """Why the compiled kernels do not take these queries, over so many keys in a format; None if they do."""
    N, H, C = q_NHC.shape
    if H * C < cpu_kernels.MIN_WIDTH and max(N, CACHE_BLOCK) * keys * H * C < cpu_kernels.MIN_ATTENTION:
        return "there is too little to compute for a call to pay"
    return format_unsupported_reason(format, q_NHC.dtype, C) or cpu_kernels.unsupported_reason(q_NHC)


def gpu_unsupported_reason(x_BHC: Tensor, cache: KeyValueBlocks) -> str | None:
    """Why no Triton kernel takes queries or keys of a step of decoding; None if one does."""
    if torch.is_grad_enabled() and x_BHC.requires_grad:
        return "a tensor needs a gradient"
    return attention_gpu.unsupported_reason(x_BHC.dtype, x_BHC.shape[2], cache.format, x_BHC.device, cache.device)


def format_unsupported_reason(format: CacheFormat, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the compiled kernels for a dtype do not read a cache's format; None if they do."""
    if head_dim > abi.MAX_HEAD_DIM:
        return f"heads are larger than {abi.MAX_HEAD_DIM}"
    if isinstance(format, Unquantized) and format.dtype != dtype:
        return f"the cache is in {format.dtype}, the model in {dtype}"
    if reason := cpu_kernels.library_unsupported_reason():
        return reason
    if format.name not in loader.loaded().cache_formats:
        return f"there are no kernels for {format.name}"
    multiple = loader.loaded().cache_formats[format.name].multiple
    if head_dim % multiple:
        return f"the head dimension is no multiple of {multiple}"
    return None
