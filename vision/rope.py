"""Rotary position embedding: the rotation of pairs, which the decoder uses too, and the angles of the tower's 2-D grid.

Shapes: L patches of a tile and the class token, C width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.vision.config import VisionConfig


def rotation_2d(config: VisionConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rotations of 2-D RoPE as unit complex numbers, [L, C / 2].

    The first half of the pairs rotates with the patch's column + 1, the second with its row + 1, both at frequencies
    theta^(-2i / (C / 2)). The class token, which is last, is not rotated. Computed in float64 on every call, so that no
    cast of the module rounds it. Source: `Llama4VisionRotaryEmbedding` of transformers.
    """
    side, half = config.grid_size, config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(0, half, 2, device=device, dtype=torch.float64) / half)
    steps = torch.arange(1, side + 1, device=device, dtype=torch.float64)
    columns = steps.repeat(side)[:, None] * frequencies
    rows = steps.repeat_interleave(side)[:, None] * frequencies
    angles = F.pad(torch.cat([columns, rows], dim=-1), (0, 0, 0, 1))
    return unit_numbers(angles, dtype)


def unit_numbers(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """cos + i sin of angles, in the complex dtype of the same precision as `dtype`."""
    return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate consecutive pairs (2i, 2i + 1) of the last dimension, as RoPE does (Su et al. 2021).

    Args:
        x: [..., C], any floating dtype.
        rotation: unit complex numbers, broadcastable to [..., C / 2].

    Returns:
        [..., C], in the rotation's precision.
    """
    pairs = torch.view_as_complex(x.to(rotation.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


def rotate_both(q: Tensor, k: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated, each in its own dtype."""
    return rotate(q, rotation).type_as(q), rotate(k, rotation).type_as(k)
