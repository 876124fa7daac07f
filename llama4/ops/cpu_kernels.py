"""What every compiled CPU kernel asks of its tensors, and the sizes from which calling one pays.

The files of the operations add what is particular to theirs. A compiled kernel has no gradient, so nothing that is
trained uses one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from llama4.kernels import abi, build, loader

MIN_MATRIX = 1 << 11
"""Elements from which a matrix is worth the call."""
MIN_WIDTH = 128
"""Elements of a token from which the small operations between matrix products are worth the call."""
MIN_ATTENTION = 1 << 20
"""Multiplications of queries with keys from which attention is worth the call, however narrow the heads are."""


@contextmanager
def any_size() -> Iterator[None]:
    """Inside, nothing is too small for the kernels: for tests of small models, and to measure the kernels. Not for
    several threads at once."""
    global MIN_MATRIX, MIN_WIDTH, MIN_ATTENTION
    before = MIN_MATRIX, MIN_WIDTH, MIN_ATTENTION
    MIN_MATRIX = MIN_WIDTH = MIN_ATTENTION = 1
    try:
        yield
    finally:
        MIN_MATRIX, MIN_WIDTH, MIN_ATTENTION = before


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why the kernels do not take these tensors, whatever the operation; None if they do."""
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    is_training = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu:
            return "a tensor is not on the CPU"
        if tensor.dtype not in abi.DTYPES:
            return "a tensor is neither float32 nor bfloat16"
        if is_training and tensor.requires_grad:
            return "a tensor needs a gradient"
    return library_unsupported_reason()


def library_unsupported_reason() -> str | None:
    """Why there are no kernels; None if there are."""
    return "there are no CPU kernels, or they are switched off" if loader.library() is None else None


@cache
def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies numbers in bfloat16 itself, as far as its system says. Then torch's products are as
    fast as those of the kernels."""
    return not build.cpu_features().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def elementwise_unsupported_reason(width: int, *tensors: Tensor) -> str | None:
    """The same for the operations between matrix products, on tokens of `width` elements."""
    if width < MIN_WIDTH:
        return "tokens are too narrow for a call to pay"
    for tensor in tensors:
        if tensor.shape[-1] % abi.LANES:
            return "the last dimension is no multiple of 16"
    return unsupported_reason(*tensors)
