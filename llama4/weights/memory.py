"""Memory for weights that are copied, in large pages, and what is said to the system about memory.

Decoding reads all weights for every token. In pages of 2 MB a processor looks up fewer addresses, and its prefetching
does not stop at every 4 KB: up to 1.7 times as fast. Only Linux is asked, and may refuse; elsewhere this is ordinary
memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from llama4.control_groups import memory_limit
from llama4.ops.memory import copy_runs, libc
from llama4.progress import PIECE, track

RESERVE = 0.05
"""Share of a device's memory left to the runtime: its context, workspaces, fragmentation."""
REGION = 64 << 20
"""Bytes that are reserved at once; pages that are never written to take no memory."""
_PAGE = 2 << 20
_CACHE_LINE = 64
_PIECE_NUMBERS = PIECE // 2
_MIN_TRIM = 8 << 20
"""Size of a tensor after which malloc is asked to return freed memory."""
_MADV_PAGEOUT = 21
"""Of Linux 5.4 and later; Python's mmap does not name it."""
_MAX_FREE, _MAX_REUSED_BLOCK = 512 << 20, 256 << 20
_MIN_RETURNED_BLOCK = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Regions:
    """Tensors one after the other in regions of large pages; a region is unmapped when its last tensor is freed."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)
        self._begins: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()

    def _renew(self) -> None:
        """In a child of a fork, too: no thread is there that would give the lock back, or finish a region."""
        self._lock = threading.Lock()
        self._region: mmap.mmap | None = None
        self._next = 0

    def contains(self, tensor: Tensor) -> bool:
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
            self._next += size + -size % _CACHE_LINE
        return torch.frombuffer(region, dtype=dtype, count=count, offset=begin).view(shape)


_regions = _Regions()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return _regions.empty(shape, dtype)


def in_large_pages(
    tensor: Tensor, dtype: torch.dtype | None = None, *, copied: Callable[[Tensor], None] | None = None
) -> Tensor:
    """A contiguous copy in large pages, or the tensor itself if it is that already.

    Args:
        copied: what is done with each piece of the tensor that is one block of memory when it has been copied.
    """
    if dtype in (None, tensor.dtype) and tensor.is_contiguous() and _regions.contains(tensor):
        return tensor
    copy = empty(tuple(tensor.shape), dtype or tensor.dtype)
    for target, values in track(list(zip(in_pieces(copy), in_pieces(tensor), strict=True))):
        copy_runs(target, values)
        if copied is not None and values.ndim and values.stride(0) * len(values) == values.numel():
            copied(values)
    return copy


def copied_from_file(
    raw: Tensor, ordered: Tensor, dtype: torch.dtype | None = None, *, from_cache: bool = False
) -> Tensor:
    """A copy in large pages of a tensor in a file's memory map, whose pages are dropped piece by piece.

    Args:
        ordered: the same, or a view of it in another order, which the copy has.
        from_cache: see `drop`.
    """
    copy = in_large_pages(ordered, dtype, copied=partial(drop, from_cache=from_cache)).view(raw.shape)
    drop(raw)
    return copy


def in_pieces(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in runs of its first dimension, as many in another dtype: so that the work on it can be interrupted."""
    if not tensor.ndim or not tensor.numel():
        return (tensor,)
    return tensor.split(max(1, _PIECE_NUMBERS * len(tensor) // tensor.numel()))


def drop(tensor: Tensor, *, from_cache: bool = False) -> None:
    """Drop the pages of a tensor in a file's memory map from this process's memory. Nobody may have written to it; they
    are read again if they are used again. Only Linux is asked.

    Args:
        from_cache: also from the system's memory, unless others have mapped them: to make room.
    """
    if not sys.platform.startswith("linux"):
        return
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    begin, end = begin + -begin % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    if begin < end:
        for advice in (*([_MADV_PAGEOUT] if from_cache else []), mmap.MADV_DONTNEED):
            libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def release(tensor: Tensor) -> None:
    """`drop`; after a large tensor, malloc returns what it keeps of freed blocks, too."""
    drop(tensor)
    if tensor.nbytes >= _MIN_TRIM and sys.platform.startswith("linux") and hasattr(libc(), "malloc_trim"):
        libc().malloc_trim(0)


@cache
def reuse_freed() -> None:
    """Let malloc keep 512 MiB of freed memory for the next allocations, in blocks of up to 256 MiB.

    By default blocks of megabytes go back to the system at once, and new ones come from it page by page, zeroed: up to
    a fifth of the time that a prompt takes in float32. This holds for the whole process from now on. Where the
    environment has settings for malloc, those are left alone.
    """
    _set_malloc({_M_TRIM_THRESHOLD: _MAX_FREE, _M_MMAP_THRESHOLD: _MAX_REUSED_BLOCK})


@contextmanager
def return_freed() -> Iterator[None]:
    """Inside, malloc returns blocks from 1 MiB on to the system as soon as they are freed.

    A step of training keeps hundreds of megabytes of activations between blocks that it frees. Of memory that malloc
    keeps, what lies between them fits nothing else, and the peak was half as much again.
    """
    _set_malloc({_M_MMAP_THRESHOLD: _MIN_RETURNED_BLOCK})
    try:
        yield
    finally:
        _set_malloc({_M_MMAP_THRESHOLD: _MAX_REUSED_BLOCK})


def _set_malloc(options: Mapping[int, int]) -> None:
    """Of glibc; not where the environment has settings for malloc."""
    if not sys.platform.startswith("linux") or any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
        return
    if hasattr(libc(), "mallopt"):
        for option, value in options.items():
            libc().mallopt(option, value)


def for_weights(device: torch.device) -> int:
    """Bytes of memory of a device that a model can use."""
    return int(usable(total(device)))


def usable(size: int) -> float:
    """Of the memory of a device, what a model can use."""
    return (1 - RESERVE) * size


def total(device: torch.device) -> int:
    """Bytes of memory of a device; of a CPU, those that this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()))
