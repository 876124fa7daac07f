"""What torch leaves out about memory: files that are mapped, and copies of short runs.

Names: a run is the last dimension of a tensor whose numbers are neighbours there.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

_WIDEST = torch.complex128
_AT_ONCE = 1 << 20
"""Bytes to ask for at once: of more, Linux begins to read what a request to the disk holds, and leaves the rest."""


@cache
def libc() -> ctypes.CDLL:
    """The system's C library; not of Windows."""
    return ctypes.CDLL(None)


def read_ahead(tensors: Iterable[Tensor]) -> None:
    """Let the system begin to read the pages of tensors in a file's memory map that are not in memory: they are needed
    next. Found missing one after the other, each would be waited for. Only Linux is told."""
    if not sys.platform.startswith("linux"):
        return
    for tensor in tensors:
        if tensor.is_cpu:
            begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            for at in range(begin, tensor.data_ptr() + tensor.nbytes, _AT_ONCE):
                length = min(_AT_ONCE, tensor.data_ptr() + tensor.nbytes - at)
                libc().madvise(ctypes.c_void_p(at), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def copy_runs(target: Tensor, values: Tensor) -> None:
    """`target.copy_(values)`, runs of 16 bytes as one number each: three times as fast where they lie apart. Such
    numbers must lie at multiples of 16, which tensors in files need not."""
    if target.dtype == values.dtype and _is_of_wide_runs(target) and _is_of_wide_runs(values):
        target, values = target.view(_WIDEST), values.view(_WIDEST)
    target.copy_(values)


def _is_of_wide_runs(tensor: Tensor) -> bool:
    size, places = tensor.itemsize, (*tensor.stride()[:-1], tensor.storage_offset())
    is_run = tensor.ndim > 0 and tensor.shape[-1] * size == _WIDEST.itemsize and tensor.stride(-1) == 1
    return is_run and not any(place * size % 16 for place in places) and tensor.data_ptr() % 16 == 0
