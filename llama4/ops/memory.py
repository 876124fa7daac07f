"""What torch leaves out about memory: files that are mapped, and copies of short runs.

Names: a run is the last dimension of a tensor whose numbers are neighbours there.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor

_WIDEST = np.dtype(np.complex128)
_LARGE_PAGE = 2 << 20
_AT_ONCE = 1 << 20
"""Bytes to announce at once: of more, Linux begins to read what a request to the disk holds, and leaves the rest."""
_MADV_POPULATE_READ = 22
"""Of Linux 5.14 and later; Python's mmap does not name it."""


@cache
def libc() -> ctypes.CDLL:
    """The system's C library; not of Windows."""
    return ctypes.CDLL(None)


def read_ahead(tensors: Iterable[Tensor]) -> None:
    """Let the pages of tensors in a file's memory map that are not in memory be read, one tensor after the other, while
    the caller goes on: they are needed next. Found missing by a product, each would be waited for. Only Linux is asked.

    Large tensors are read in pages of 2 MB, where the file system has such (XFS; ext4 since Linux 6.16): per byte that
    takes a tenth of the system's time. Of small ones no more than their own pages is read.
    """
    if not sys.platform.startswith("linux"):
        return
    large = []
    for tensor in tensors:
        if tensor.nbytes >= _LARGE_PAGE and tensor.is_cpu:
            large.append(tensor)
        elif tensor.is_cpu:
            _announce(tensor)
    if large:
        threading.Thread(target=_read, args=(large,), daemon=True).start()


def _read(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        _advise(tensor, mmap.MADV_HUGEPAGE)
        if _advise(tensor, _MADV_POPULATE_READ):
            _announce(tensor)


def _announce(tensor: Tensor) -> None:
    for at in range(0, tensor.nbytes, _AT_ONCE):
        _advise(tensor, mmap.MADV_WILLNEED, at, min(_AT_ONCE, tensor.nbytes - at))


def _advise(tensor: Tensor, advice: int, offset: int = 0, size: int | None = None) -> int:
    """Say something about the pages in which some bytes of a tensor lie; -> 0, or -1 if the system refuses."""
    begin = tensor.data_ptr() + offset
    end = begin + (tensor.nbytes if size is None else size)
    begin -= begin % mmap.PAGESIZE
    result: int = libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
    return result


def copy_runs(target: Tensor, values: Tensor) -> None:
    """`target.copy_(values)`, runs of 16 bytes as one number each: three times as fast where they lie apart. They may
    begin anywhere, as tensors in files do, which torch's numbers may not and numpy's may."""
    if target.dtype == values.dtype and _is_of_wide_runs(target) and _is_of_wide_runs(values):
        np.copyto(*(each.detach().view(torch.uint8).numpy().view(_WIDEST) for each in (target, values)))
    else:
        target.copy_(values)


def _is_of_wide_runs(tensor: Tensor) -> bool:
    is_run = tensor.ndim > 0 and tensor.shape[-1] * tensor.itemsize == _WIDEST.itemsize and tensor.stride(-1) == 1
    return is_run and tensor.is_cpu
