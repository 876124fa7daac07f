"""What positions multiply queries and keys by: the rotations of RoPE, and the attention temperature.

Shapes: N packed tokens, C head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llama4.cache.batch import Batch
from llama4.config import TextConfig
from llama4.config.window import chunk_offset
from llama4.model.rope_scaling import rope_frequencies
from llama4.vision.rope import unit_numbers


class PositionFactors:
    """The factors of the tokens of one forward, computed once and shared by all layers.

    Attributes:
        rotations: for each window of the layers with RoPE, complex numbers [N, C / 2].
        temperature_N: what layers without RoPE multiply their queries by.
    """

    def __init__(
        self, config: TextConfig, positions_N: Tensor, dtype: torch.dtype, lengths_N: Tensor | None = None
    ) -> None:
        """Args:
        positions_N: int64, each counted from the beginning of the token's own sequence.
        dtype: of the model; the factors are in float32 or better.
        lengths_N: the length of each token's sequence, for rules of RoPE that depend on it.
        """
        precision = torch.promote_types(dtype, torch.float32)
        windows = {config.window(i) for i in range(config.num_hidden_layers) if config.uses_rope(i)}
        frequencies, factor = _frequencies(config, positions_N.device, lengths_N)
        self.rotations = {w: rope_rotation(frequencies, positions_N, w, precision) for w in windows}
        if factor != 1:
            self.rotations = {w: rotation * factor for w, rotation in self.rotations.items()}
        self.temperature_N = attention_temperature(config, positions_N, precision)

    @classmethod
    def of_batch(
        cls, config: TextConfig, batch: Batch, dtype: torch.dtype, steps: int | None = None
    ) -> PositionFactors:
        """Those of a batch; with `steps`, of a batch of decoding and of the steps after it, S * B tokens."""
        positions, scaling = batch.positions_N, config.rope_scaling
        lengths = batch.rope_lengths_N() if scaling is not None and scaling.by_length else None
        if steps is not None:
            ahead_S1 = torch.arange(steps, device=positions.device)[:, None]
            positions = (positions + ahead_S1).flatten()
            lengths = lengths.repeat(steps) if lengths is not None else None
        return cls(config, positions, dtype, lengths)


def _frequencies(config: TextConfig, device: torch.device, lengths_N: Tensor | None) -> tuple[Tensor, float]:
    fixed = lengths_N is None and device.type != "cpu"
    return _frequencies_on(config, device) if fixed else rope_frequencies(config, lengths_N)


@lru_cache
def _frequencies_on(config: TextConfig, device: torch.device) -> tuple[Tensor, float]:
    """`rope_frequencies`, copied to a device once: the host would wait for a copy in every forward."""
    frequencies, factor = rope_frequencies(config)
    return frequencies.to(device), factor


def rope_rotation(frequencies: Tensor, positions_N: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """RoPE's rotations at these positions as unit complex numbers, [N, C / 2], whose parts have this dtype.

    In a chunked layer only tokens of one chunk see each other, and RoPE depends on differences alone, so the position
    within the chunk serves as well as the absolute one. Its angle stays small: exact at ten million tokens, where a
    float32 angle of the absolute position is off by half a radian. Nothing is kept in a buffer that a cast of the
    module could round.

    Args:
        frequencies: float64, [C / 2] or [N, C / 2]; see `rope_frequencies`.
    """
    offsets_N = chunk_offset(positions_N, window).to(torch.float64)
    return unit_numbers(offsets_N[:, None] * frequencies, dtype)


def attention_temperature(config: TextConfig, positions_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of queries in layers without RoPE, [N]: 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)).

    After "Scalable-Softmax Is Superior for Attention" (Nakanishi 2025), as Llama 4 uses it.
    """
    steps_N = torch.div(positions_N + 1, config.floor_scale, rounding_mode="floor")
    return (torch.log1p(steps_N.to(torch.float64)) * config.attn_scale + 1.0).to(dtype)
