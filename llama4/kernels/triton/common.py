"""What the launchers of kernels share. Triton is not imported here, and by them at the first launch.

Shapes: N rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama4.kernels.triton import launch_cache

MAX_WIDTH = 1 << 15
"""Widest rows that a program holds."""
BLOCK = 1024
"""Elements that a program computes where it does not need all of a row."""


class Gpu(NamedTuple):
    """What launches depend on.

    Attributes:
        capability: compute capability, such as 90.
    """

    capability: int
    multiprocessors: int


GPUS: dict[torch.device, Gpu] = {}
"""Those seen so far. Who interprets kernels, or compiles them for a GPU that is not there, enters it here."""


def gpu(device: torch.device) -> Gpu:
    if device not in GPUS:
        properties = torch.cuda.get_device_properties(device)
        GPUS[device] = Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)
    return GPUS[device]


def has_e4m3(device: torch.device) -> bool:
    """Whether a GPU has instructions for e4m3: from Ada on."""
    return gpu(device).capability >= 89


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **sizes: Any) -> None:
    """On the device of `like`; nothing where there is nothing to compute."""
    if all(grid) and not launch_cache.launch(kernel, grid, like, arguments, sizes):
        with torch.cuda.device_of(like):
            kernel[grid](*arguments, **sizes, **launch_cache.OPTIONS)


def whole_row(width: int) -> dict[str, int]:
    """Sixteen elements for each thread of a program that holds a row, as far as there are threads."""
    block = next_power_of_two(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def next_power_of_two(n: int) -> int:
    """The smallest that is no less than n."""
    return 1 << (n - 1).bit_length()
