"""Files in a memory map, and copies of short runs, wherever they lie."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama4.ops.memory import copy_runs, libc, read_ahead
from llama4.ops.quantized import copied, deinterleaved16, interleaved16
from llama4.quantization.modules import MappedEmbedding
from llama4.weights import memory


@pytest.mark.parametrize("begin", [0, 2, 4, 8, 12, 16])
@pytest.mark.parametrize(("dtype", "together"), [(torch.int32, 4), (torch.bfloat16, 1), (torch.float32, 1)])
def test_rows_are_interleaved_wherever_a_file_has_them(begin: int, dtype: torch.dtype, together: int) -> None:
    """Tensors in a file begin anywhere: numbers of 16 bytes do not."""
    if begin % dtype.itemsize:
        pytest.skip("not a place of such numbers")
    values = torch.randint(-99, 99, (64, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
    block = torch.empty(values.nbytes + 32, dtype=torch.uint8)
    storage = block.untyped_storage()[begin : begin + values.nbytes]
    part = torch.empty(0, dtype=torch.uint8).set_(storage).view(dtype).view(values.shape).copy_(values)
    copy = copied(interleaved16(part, together), part)
    assert torch.equal(copy.view(-1), interleaved16(values, together).contiguous().view(-1))
    assert torch.equal(deinterleaved16(copy, together), values)
    odd = torch.empty(values.numel() + 1, dtype=dtype)[1:].view(values.shape)
    copy_runs(odd.view(-1, 4), part.view(-1, 4))
    assert torch.equal(odd, values)


MIB = 1 << 20


def cold_file(path: Path, size: int) -> Tensor:
    """The memory map of a new file, of which nothing is in memory."""
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if resident_pages(mapped):
        pytest.skip("this file system is memory")
    return mapped


def resident_pages(tensor: Tensor) -> int:
    """Of those that a tensor lies in, how many are in memory, mapped or not."""
    begin, end = tensor.data_ptr() // mmap.PAGESIZE, -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * (end - begin))()
    address, length = ctypes.c_void_p(begin * mmap.PAGESIZE), ctypes.c_size_t((end - begin) * mmap.PAGESIZE)
    assert libc().mincore(address, length, pages) == 0
    return sum(page & 1 for page in pages)


def mapped_kilobytes(path: Path) -> int:
    """What the process has of a file in its own page table."""
    regions = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(int(region.split("Rss:")[1].split()[0]) for region in regions)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is asked")
def test_what_is_read_ahead_is_mapped_before_it_is_used(tmp_path: Path) -> None:
    mapped = cold_file(tmp_path / "file", 9 * MIB)
    before = set(threading.enumerate())
    read_ahead([mapped[MIB // 2 :]])
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert resident_pages(mapped[MIB // 2 :]) == 17 * MIB // 2 // mmap.PAGESIZE
    if libc().madvise(ctypes.c_void_p(mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE), ctypes.c_size_t(1), 22):
        pytest.skip("this Linux is older than 5.14")
    assert mapped_kilobytes(tmp_path / "file") >= 6 * 1024  # a large page across the border of a tensor may come later


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is asked")
def test_what_was_copied_makes_room(tmp_path: Path) -> None:
    """Of large pages that lie half in a piece some may stay."""
    mapped = cold_file(tmp_path / "file", 32 * MIB)
    truth = mapped.clone()
    assert resident_pages(mapped) == 32 * MIB // mmap.PAGESIZE
    copy = memory.in_large_pages(mapped, copied=partial(memory.drop, from_cache=True))
    assert resident_pages(mapped) <= 8 * MIB // mmap.PAGESIZE
    assert torch.equal(copy, truth)
    assert torch.equal(mapped, truth)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is asked")
def test_of_an_embedding_in_a_file_only_rows_are_read(tmp_path: Path) -> None:
    rows, width = 2000, 10 * 1024
    weight = (
        cold_file(tmp_path / "file", rows * width)[4 : 4 + (rows - 1) * width].view(torch.bfloat16).view(rows - 1, -1)
    )
    embedding = nn.Embedding(1, 1)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    ids = torch.tensor([[1700, 3], [900, 3]])
    read = MappedEmbedding(embedding)(ids)
    assert resident_pages(weight) <= 3 * (math.ceil(width / mmap.PAGESIZE) + 1)
    assert torch.equal(read.view(torch.int16), weight[ids].view(torch.int16))
