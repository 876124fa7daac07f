"""What torch leaves out about memory: files that are mapped, and copies of short runs.

Names: a run is the last dimension of a tensor whose numbers are neighbours there.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import sys
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RUN = 16
_LARGE_PAGE = 2 << 20
_AT_ONCE = 1 << 20
"""Bytes to announce at once: of more, Linux begins to read what a request to the disk holds, and leaves the rest."""
_READERS = 2
_MADV_POPULATE_READ = 22
"""Of Linux 5.14 and later; Python's mmap does not name it."""


def to_device(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers, int64, on a device, without waiting for what that computes."""
    there = torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)


@cache
def libc() -> ctypes.CDLL:
    """The system's C library; not of Windows."""
    return ctypes.CDLL(None)


def read_ahead(tensors: Iterable[Tensor]) -> None:
    """Let the pages of tensors in a file's memory map that are not in memory be read, one tensor after the other, while
    the caller goes on: they are needed next. Found missing by a product, each would be waited for. Only Linux is asked.

    Large tensors are read 2 MB at a time by two threads, no more than that ahead, and into large pages where the file
    system has such (XFS; ext4 since Linux 6.16): per byte that takes a tenth of the system's time. Of small ones their
    own pages alone are read.
    """
    if not sys.platform.startswith("linux"):
        return
    large, pieces = [], []
    for tensor in tensors:
        if tensor.is_cpu and tensor.nbytes >= _LARGE_PAGE:
            large.append(tensor)
            if _missing_are_read_in_large_pieces() and not _advise(tensor, mmap.MADV_HUGEPAGE):
                _advise(tensor, mmap.MADV_RANDOM)
            else:
                _announce(tensor)
            borders = range(_LARGE_PAGE - tensor.data_ptr() % _LARGE_PAGE, tensor.nbytes, _LARGE_PAGE)
            pieces += [(tensor, *ends) for ends in pairwise([0, *borders, tensor.nbytes])]
        elif tensor.is_cpu:
            _announce(tensor)
    following = iter(pieces)
    try:
        for _ in range(min(_READERS, len(pieces))):
            threading.Thread(target=_read, args=(following, large), daemon=True).start()
    except RuntimeError:  # no more threads, or the interpreter ends: what is not read ahead is read when it is used
        _read(iter(()), large)


@cache
def _missing_are_read_in_large_pieces() -> bool:
    """Whether a page that is missing in memory for which large pages are wanted is read with the 2 MB around it, and no
    more if that is said to be used at random: by Linux 5.18 and later. Before, it would be read alone."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= (5, 18)


def _read(pieces: Iterable[tuple[Tensor, int, int]], tensors: Sequence[Tensor]) -> None:
    for tensor, begin, end in pieces:
        _advise(tensor, _MADV_POPULATE_READ, begin, end - begin)
    for tensor in tensors:  # what is used at random is the first that Linux drops, however lately it was
        _advise(tensor, mmap.MADV_NORMAL)


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
        np.copyto(_numbers(target), _numbers(values))
    else:
        target.copy_(values)


def _is_of_wide_runs(tensor: Tensor) -> bool:
    is_run = tensor.ndim > 0 and tensor.shape[-1] * tensor.itemsize == _RUN and tensor.stride(-1) == 1
    return is_run and tensor.is_cpu


def _numbers(tensor: Tensor) -> NDArray[np.complex128]:
    """A tensor of runs of 16 bytes, each as one number."""
    return tensor.detach().view(torch.uint8).numpy().view(np.complex128)
