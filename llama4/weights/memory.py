"""Memory for weights that are not a file's map. Decoding reads all of it for every token, and how fast depends on the
system's pages: in those of 2 MB a processor looks up fewer addresses and reads on without a pause, up to 1.7 times as
fast as in those of 4 KB. And memory for what is computed, which malloc is asked to keep.

Only Linux can be asked, and may refuse; all else is plain memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from functools import cache

import torch
from torch import Tensor

REGION = 64 << 20
"""Bytes that are asked for at once; those that are never written to take no memory."""
_PAGE = 2 << 20
_LINE = 64
_WORTH_TRIMMING = 8 << 20
_KEPT, _LARGEST_KEPT = 512 << 20, 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Regions:
    """Tensors lie one after the other in regions of large pages; a region is let go of with its last tensor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: mmap.mmap | None = None
        self._next = 0
        self._begins: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()

    def hold(self, tensor: Tensor) -> bool:
        begin = tensor.data_ptr()
        with self._lock:
            return any(first <= begin < first + len(region) for region, first in self._begins.items())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = count * dtype.itemsize
        with self._lock:
            if self._region is None or self._next + size > len(self._region):
                self._region = mmap.mmap(-1, max(REGION, size) + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._region.madvise(mmap.MADV_HUGEPAGE)
                self._begins[self._region] = ctypes.addressof(ctypes.c_char.from_buffer(self._region))
                self._next = -self._begins[self._region] % _PAGE
            region, begin = self._region, self._next
            self._next += size + -size % _LINE
        return torch.frombuffer(region, dtype=dtype, count=count, offset=begin).view(shape)


_regions = _Regions()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU with nothing in it yet."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return _regions.empty(shape, dtype)


def keep(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy here, or the tensor itself if it is that already."""
    if dtype in (None, tensor.dtype) and tensor.is_contiguous() and _regions.hold(tensor):
        return tensor
    return empty(tuple(tensor.shape), dtype or tensor.dtype).copy_(tensor)


def release(tensor: Tensor) -> None:
    """Of a file's map, which nobody has written to: what has been read no longer counts as memory of this process, and
    is read again if it is wanted again. After a large one, what malloc keeps of freed blocks goes back, too."""
    if not sys.platform.startswith("linux"):
        return
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    begin, end = begin + -begin % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    if begin < end:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
    if tensor.nbytes >= _WORTH_TRIMMING and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@cache
def reuse_freed() -> None:
    """Let malloc keep what this process frees for what it wants next: 512 MiB in all, in blocks of up to 256 MiB.

    Otherwise blocks of megabytes go back to the system at once, and new ones come from it page by page, emptied first:
    up to a fifth of the time that a prompt takes in float32. It holds for the whole process from now on, and not where
    the environment has settings for malloc of its own.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # of glibc
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
