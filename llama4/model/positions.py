"""What positions multiply queries and keys by: the rotations of RoPE, and the attention temperature.

Shapes: N packed tokens, C head_dim.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from llama4.config import TextConfig
from llama4.config.window import chunk_offset
from llama4.vision.rope import unit_numbers


class PositionFactors:
    """The factors of the tokens of one forward, computed once and shared by all layers.

    Attributes:
        rotations: for each window of the layers with RoPE, unit complex numbers [N, C / 2].
        temperature_N: what layers without RoPE multiply their queries by.
    """

    def __init__(self, config: TextConfig, positions_N: Tensor, dtype: torch.dtype) -> None:
        """Args:
        positions_N: int64, each counted from the beginning of the token's own sequence.
        dtype: of the model; the factors are in float32 or better.
        """
        precision = torch.promote_types(dtype, torch.float32)
        windows = {config.window(i) for i in range(config.num_hidden_layers) if config.uses_rope(i)}
        self.rotations = {w: rope_rotation(config, positions_N, w, precision) for w in windows}
        self.temperature_N = attention_temperature(config, positions_N, precision)


@lru_cache
def _frequencies_on(config: TextConfig, device: torch.device) -> Tensor:
    """`rope_frequencies`, copied to a device once: the host would wait for a copy in every forward."""
    return rope_frequencies(config).to(device)


def rope_frequencies(config: TextConfig) -> Tensor:
    """Radians per position of each of the C / 2 pairs, float64.

    theta^(-2i / C) (Su et al. 2021), lowered by `rope_scaling`. Rule "llama3" (Llama 3.1): wavelengths longer than
    original / low_freq_factor are stretched by `factor`, those shorter than original / high_freq_factor are kept, and
    in between the two are blended. Rule "linear": all are stretched.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return stretched
    rotations_in_original_context = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((rotations_in_original_context - low) / max(high - low, 1e-30)).clamp(0, 1)
    return torch.lerp(stretched, frequencies, blend)


def rope_rotation(config: TextConfig, positions_N: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """RoPE's rotations at these positions as unit complex numbers, [N, C / 2], whose parts have this dtype.

    In a chunked layer only tokens of one chunk see each other, and RoPE depends on differences alone, so the position
    within the chunk serves as well as the absolute one. Its angle stays small: exact at ten million tokens, where a
    float32 angle of the absolute position is off by half a radian. Nothing is kept in a buffer that a cast of the
    module could round.
    """
    offsets_N = chunk_offset(positions_N, window).to(torch.float64)
    device = positions_N.device
    frequencies = rope_frequencies(config) if device.type == "cpu" else _frequencies_on(config, device)
    return unit_numbers(offsets_N[:, None] * frequencies, dtype)


def attention_temperature(config: TextConfig, positions_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of queries in layers without RoPE, [N]: 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)).

    After "Scalable-Softmax Is Superior for Attention" (Nakanishi 2025), as Llama 4 uses it.
    """
    steps_N = torch.div(positions_N + 1, config.floor_scale, rounding_mode="floor")
    return (torch.log1p(steps_N.to(torch.float64)) * config.attn_scale + 1.0).to(dtype)
