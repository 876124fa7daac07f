"""Attention in a step of decoding, and writing a cache, on the Triton kernels of a GPU, which read and write blocks
where they are.

Shapes: B rows, N tokens of a row, H query heads, K key/value heads, C head_dim, W blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.cache.formats import CacheFormat, Unquantized
from llama4.kernels.triton import launch_attention, support


def kind_of(format: CacheFormat) -> str:
    """A cache's format, as the kernels name it."""
    return str(format.dtype).removeprefix("torch.") if isinstance(format, Unquantized) else format.name


def unsupported_reason(
    dtype: torch.dtype, head_dim: int, format: CacheFormat, device: torch.device, blocks_device: torch.device
) -> str | None:
    """Why the kernels do not read and write blocks of a format, for a model in a dtype on a device; None if they do."""
    if device.type != "cuda":
        return "the model is not on a GPU"
    if blocks_device.type != "cuda" or blocks_device.index not in (None, device.index):
        return f"the cache's blocks are on {blocks_device}"
    if kind_of(format) not in launch_attention.KINDS:
        return f"there are no kernels for a cache in {kind_of(format)}"
    if head_dim > launch_attention.MAX_HEAD_DIM:
        return f"heads are larger than {launch_attention.MAX_HEAD_DIM}"
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    return support.unsupported_reason(device, dtype)


def decode_attention(
    q_BHC: Tensor, block_table_BW: Tensor, lengths_B: Tensor, heads: int, format: CacheFormat
) -> Tensor:
    """See `ops.attention.decode_attention`. There must be no `unsupported_reason`."""
    return launch_attention.attend(_adjacent(q_BHC), block_table_BW, lengths_B, heads, kind_of(format))


def write_and_attend(
    q_BHC: Tensor,
    k_BKC: Tensor,
    v_BKC: Tensor,
    block_table_BW: Tensor,
    slots_B: Tensor,
    lengths_B: Tensor,
    format: CacheFormat,
) -> Tensor:
    """`write_step`, and `decode_attention` that sees what was written, in one launch less."""
    new = _adjacent(k_BKC.detach()), _adjacent(v_BKC.detach()), slots_B
    return launch_attention.attend(_adjacent(q_BHC), block_table_BW, lengths_B, k_BKC.shape[1], kind_of(format), new)


def write_step(k_BKC: Tensor, v_BKC: Tensor, block_table_BW: Tensor, slots_B: Tensor, format: CacheFormat) -> None:
    """Write the key and value of one new token of each row into a slot of the row's blocks, encoded in the format.
    There must be no `unsupported_reason`."""
    k_BKC, v_BKC = _adjacent(k_BKC.detach()), _adjacent(v_BKC.detach())
    launch_attention.write(k_BKC, v_BKC, block_table_BW, slots_B, kind_of(format))


def write_run(k_NKC: Tensor, v_NKC: Tensor, blocks_W: Tensor, first: int, format: CacheFormat) -> None:
    """Write the keys and values of new tokens of one row into its slots from `first` on. There must be no
    `unsupported_reason`."""
    launch_attention.write_run(_adjacent(k_NKC.detach()), _adjacent(v_NKC.detach()), blocks_W, first, kind_of(format))


def _adjacent(x_BHC: Tensor) -> Tensor:
    return x_BHC if x_BHC.stride(-1) == 1 else x_BHC.contiguous()
