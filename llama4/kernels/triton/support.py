"""Whether the kernels run on a device. Where they do not, torch's own operations serve."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from llama4.config import CACHE_BLOCK
from llama4.kernels.triton import common, launch_attention, launch_cache, launch_elementwise, launch_products

logger = logging.getLogger(__name__)

SWITCH = "LLAMA4_GPU_KERNELS"
"""Environment variable; "off" keeps to torch."""
MIN_CAPABILITY = 80
"""Ampere's: it computes with bfloat16, and copies to shared memory beside other work."""


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take tensors there; None if they do."""
    if device.type != "cuda":
        return f"they are for GPUs, not for {device.type}"
    if os.environ.get(SWITCH, "").lower() == "off":
        return f"{SWITCH} is off"
    if torch.version.hip is not None:
        return "they are for NVIDIA's GPUs, and torch is built for ROCm"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they do not take {dtype}"
    return _failure(device)


@cache
def grouped_mm_unsupported_reason(device: torch.device) -> str | None:
    """Why `launch_products.grouped_mm` does not run on a GPU whose other kernels do; None if it does."""
    if common.gpu(device).capability // 10 != 9:
        return "it is for Hopper"
    reason = _tried(_grouped_mm_fault, device)
    if reason is not None:
        logger.warning("the experts' Triton kernel does not run on %s (%s); torch's is slower", device, reason)
    return reason


@cache
def _failure(device: torch.device) -> str | None:
    """What is wrong with a GPU, or the error of trying; logged once."""
    reason = _tried(_fault, device)
    if reason is not None:
        logger.warning("the Triton kernels do not run on %s (%s); torch's own operations are slower", device, reason)
    elif (again := _tried(_fault, device)) is not None:  # launched from what was kept the first time
        launch_cache.enabled = False
        logger.warning("kept launches fail on %s (%s); Triton's own take longer", device, again)
    return reason


def _tried(fault: Callable[[torch.device], str | None], device: torch.device) -> str | None:
    try:
        return fault(device)
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def _grouped_mm_fault(device: torch.device) -> str | None:
    x_1I, weight_1IO = (torch.ones(*shape, dtype=torch.bfloat16, device=device) for shape in ((1, 64), (1, 64, 8)))
    y_1O = launch_products.grouped_mm(x_1I, torch.ones(1, dtype=torch.int64, device=device), weight_1IO)
    return None if (y_1O == 64).all() else f"a product gave {y_1O[0, 0].item()} instead of 64"


def _fault(device: torch.device) -> str | None:
    if (capability := common.gpu(device).capability) < MIN_CAPABILITY:
        return f"its compute capability is {capability / 10}; they need {MIN_CAPABILITY / 10}"
    for name, y, truth in _probes(device):
        if not (y - truth).abs().max() < 1e-3:  # nor is NaN
            return f"{name} gave {y.flatten()[0].item()} instead of {truth}"
    return None


def _probes(device: torch.device) -> Iterator[tuple[str, Tensor, int]]:
    """What small launches of the kinds of kernels give, and what all of their numbers should be."""
    x = torch.ones(1, 32, device=device)
    values, scales = torch.ones(4, 32, dtype=torch.int8, device=device), torch.full((4, 1), 0.5, device=device)
    yield "a product", launch_products.product("int8", x, values, scales), 16
    yield "a norm", launch_elementwise.rms_norm(x, 4 * x[0], 3.0), 2
    block_2KSC = torch.full((2, 1, CACHE_BLOCK, 16), torch.nan, device=device)
    block_2KSC[:, :, 0], block_2KSC[:, :, 1] = 1, 3
    table_11, length_1 = torch.tensor([[block_2KSC.data_ptr()]], device=device), torch.tensor([2], device=device)
    q_11C = torch.zeros(1, 1, 16, device=device)
    yield "attention", launch_attention.attend(q_11C, table_11, length_1, 1, "float32"), 2
