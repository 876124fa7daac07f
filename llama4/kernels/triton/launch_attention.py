"""Launches the kernels of `attention` for one step of decoding on a GPU, and the one that writes a cache.

Nothing here reads a value on the host or waits for the device, and the sizes of launches follow from shapes alone: a
step can be replayed from a CUDA graph with other tokens, slots, lengths and blocks. Triton is imported at the first
launch.

Shapes: B rows, N tokens of a row, H query heads, K key/value heads, C head_dim, W blocks of a row at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama4.config import CACHE_BLOCK
from llama4.kernels.triton import common

KINDS = ("bfloat16", "float16", "float32", "int8", "fp8", "int4")
"""What caches hold: dtypes, and formats with scales."""
MAX_SPLITS = 128
"""Most shares of a row's keys."""
MAX_HEAD_DIM = 256


def attend(
    q_BHC: Tensor,
    table_BW: Tensor,
    lengths_B: Tensor,
    heads: int,
    kind: str,
    new: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """One query per head and row against the first `lengths_B` slots of the row, at least one; -> [B, H, C] in the
    dtype of the queries. The scale of the softmax is C^-0.5.

    Args:
        q_BHC: any strides but in the last dimension.
        table_BW: addresses of the blocks of each row, int64, on the device of the queries, as are the blocks.
        lengths_B: int32 or int64, on the device.
        heads: K.
        kind: one of KINDS, of the blocks.
        new: keys, values and slots, as for `write`, which is done first, in the same launch; the slots are among those
            that are read.
    """
    from llama4.kernels.triton import attention

    (B, H, C), width = q_BHC.shape, _width(q_BHC.shape[2], kind)
    assert q_BHC.stride(2) == table_BW.stride(1) == 1
    k_BKC, v_BKC, slots_B = new or (None, None, None)
    strides: list[int] = [q_BHC.stride(0), q_BHC.stride(1), table_BW.stride(0)]
    for x_BKC in (k_BKC, v_BKC):
        assert x_BKC is None or x_BKC.stride(2) == 1
        strides += x_BKC.stride()[:2] if x_BKC is not None else (0, 0)
    splits = num_splits(B * heads, q_BHC.device)
    out_BHC = torch.empty(B, H, C, dtype=q_BHC.dtype, device=q_BHC.device)
    parts_BHSC, lse_BHS = None, None
    if splits > 1:
        parts_BHSC = torch.empty(B, H, splits, C, dtype=torch.float32, device=q_BHC.device)
        lse_BHS = torch.empty(B, H, splits, dtype=torch.float32, device=q_BHC.device)
    block_c = max(16, common.next_power_of_two(width))
    block_s = max(16, min(64, 2**14 // (block_c * q_BHC.dtype.itemsize)))  # four tiles of 16 KiB are under way
    common.launch(
        *(attention.attend, (B * heads, splits), q_BHC),
        *(q_BHC, table_BW, lengths_B, parts_BHSC, lse_BHS, out_BHC, k_BKC, v_BKC, slots_B),
        *(*strides, C**-0.5 * attention.LOG2_E.value, splits),
        stored=_stored(kind),
        kind=kind,
        K=heads,
        G=H // heads,
        C=C,
        BLOCK=CACHE_BLOCK,
        BLOCK_G=max(16, common.next_power_of_two(H // heads)),
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        STAGES=3,
        num_warps=4,
    )
    if splits > 1:
        common.launch(
            *(attention.combine, (B * H,), q_BHC),
            *(parts_BHSC, lse_BHS, lengths_B, out_BHC, splits),
            H=H,
            C=C,
            MAX_SPLITS=MAX_SPLITS,
            BLOCK_S=block_s,
            BLOCK_C=common.next_power_of_two(C),
            AT_ONCE=16,
            num_warps=4,
        )
    return out_BHC


def write(k_BKC: Tensor, v_BKC: Tensor, table_BW: Tensor, slots_B: Tensor, kind: str) -> None:
    """Put the key and value of one new token of each row into a slot of the row, encoded as `kind`.

    Args:
        k_BKC, v_BKC: any strides but in the last dimension.
        table_BW: as for `attend`; the blocks that are written to must be the row's own.
        slots_B: int32 or int64, on the device.
    """
    _write(k_BKC, v_BKC, table_BW, slots_B, 0, kind)


def write_run(k_NKC: Tensor, v_NKC: Tensor, table_W: Tensor, first: int, kind: str) -> None:
    """Put the keys and values of new tokens of one row into its slots from `first` on.

    Args: see `write`.
    """
    _write(k_NKC, v_NKC, table_W.expand(len(k_NKC), -1), None, first, kind)


def _write(k_BKC: Tensor, v_BKC: Tensor, table_BW: Tensor, slots_B: Tensor | None, first: int, kind: str) -> None:
    from llama4.kernels.triton import attention

    B, K, C = k_BKC.shape
    assert k_BKC.stride(2) == v_BKC.stride(2) == table_BW.stride(1) == 1
    common.launch(
        *(attention.write, (B * K, 2), k_BKC),
        *(k_BKC, v_BKC, table_BW, slots_B, first),
        *(*k_BKC.stride()[:2], *v_BKC.stride()[:2], table_BW.stride(0)),
        kind=kind,
        stored=_stored(kind),
        K=K,
        C=C,
        BLOCK=CACHE_BLOCK,
        BLOCK_C=common.next_power_of_two(_width(C, kind)),
        num_warps=1,
    )


def num_splits(row_heads: int, device: torch.device) -> int:
    """Shares that the keys of each row and key head are cut into, so that there are about two programs for each of the
    device's multiprocessors."""
    return max(1, min(MAX_SPLITS, 2 * common.gpu(device).multiprocessors // row_heads))


def _width(head_dim: int, kind: str) -> int:
    """Values stored for one token and head, where a byte is one value."""
    return head_dim // 2 if kind == "int4" else head_dim


def _stored(kind: str) -> Any:
    import triton.language as tl

    return {"int8": tl.int8, "fp8": tl.uint8, "int4": tl.uint8}.get(kind) or getattr(tl, kind)
