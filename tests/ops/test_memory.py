"""Copies of short runs, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from llama4.ops.memory import copy_runs
from llama4.ops.quantized import copied, deinterleaved16, interleaved16


@pytest.mark.parametrize("begin", [0, 2, 4, 8, 12, 16])
@pytest.mark.parametrize(("dtype", "together"), [(torch.int32, 4), (torch.bfloat16, 1), (torch.float32, 1)])
def test_rows_are_interleaved_wherever_a_file_has_them(begin: int, dtype: torch.dtype, together: int) -> None:
    """Tensors in a file begin anywhere: numbers of 16 bytes do not."""
    if begin % dtype.itemsize:
        pytest.skip("not a place of such numbers")
    values = torch.randint(-99, 99, (64, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
    memory = torch.empty(values.nbytes + 32, dtype=torch.uint8)
    storage = memory.untyped_storage()[begin : begin + values.nbytes]
    part = torch.empty(0, dtype=torch.uint8).set_(storage).view(dtype).view(values.shape).copy_(values)
    copy = copied(interleaved16(part, together), part)
    assert torch.equal(copy.view(-1), interleaved16(values, together).contiguous().view(-1))
    assert torch.equal(deinterleaved16(copy, together), values)
    odd = torch.empty(values.numel() + 1, dtype=dtype)[1:].view(values.shape)
    copy_runs(odd.view(-1, 4), part.view(-1, 4))
    assert torch.equal(odd, values)
