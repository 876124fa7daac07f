"""RoPE's frequencies, and the rules that lower them for contexts longer than those of training.

Each rule is a function of `RULES`: the frequencies of the unscaled model [C / 2], float64 -> its own, and what queries
and keys are multiplied by. Rules that look at the length of a sequence give one row of frequencies for each length.

Shapes: N packed tokens, C head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llama4.config import RopeScaling, TextConfig


def rope_frequencies(config: TextConfig, lengths_N: Tensor | None = None) -> tuple[Tensor, float]:
    """Radians per position of each of the C / 2 pairs, float64, [C / 2], and what queries and keys are multiplied by.

    theta^(-2i / C) (Su et al. 2021), lowered by `rope_scaling`.

    Args:
        lengths_N: for a rule that looks at it, the length of each token's sequence; the result is [N, C / 2] then.
    """
    device = lengths_N.device if lengths_N is not None else None
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_scaling is None:
        return frequencies, 1.0
    return RULES[config.rope_scaling.rope_type](frequencies, config.rope_scaling, config, lengths_N)


def _linear(
    frequencies: Tensor, scaling: RopeScaling, config: TextConfig, lengths_N: Tensor | None
) -> tuple[Tensor, float]:
    """All are stretched (Chen et al. 2023)."""
    return frequencies / scaling.factor, 1.0


def _llama3(
    frequencies: Tensor, scaling: RopeScaling, config: TextConfig, lengths_N: Tensor | None
) -> tuple[Tensor, float]:
    """Llama 3.1: wavelengths longer than original / low_freq_factor are stretched by `factor`, those shorter than
    original / high_freq_factor are kept, and in between the two are blended."""
    rotations_in_original_context = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((rotations_in_original_context - low) / max(high - low, 1e-30)).clamp(0, 1)
    return torch.lerp(frequencies / scaling.factor, frequencies, blend), 1.0


def _dynamic(
    frequencies: Tensor, scaling: RopeScaling, config: TextConfig, lengths_N: Tensor | None
) -> tuple[Tensor, float]:
    """NTK-aware: a larger base, the larger the longer the sequence is beyond the original window (u/emozilla 2023).
    Source: transformers' `_compute_dynamic_ntk_parameters`."""
    assert lengths_N is not None
    original, head_dim = scaling.original_max_position_embeddings, config.head_dim
    ratio_N1 = (lengths_N.to(torch.float64) / original).clamp(min=1.0)[:, None]
    growth_N1 = (scaling.factor * ratio_N1 - (scaling.factor - 1)) ** (head_dim / max(head_dim - 2, 1))
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=frequencies.device)
    return frequencies * growth_N1 ** (-pairs / head_dim), 1.0


def _yarn(
    frequencies: Tensor, scaling: RopeScaling, config: TextConfig, lengths_N: Tensor | None
) -> tuple[Tensor, float]:
    """Peng et al. 2023: pairs that turn more than beta_fast times in the original window are kept, those that turn less
    than beta_slow times are stretched, and in between the two are blended, by the number of the pair."""

    def pair_of(rotations: float) -> float:
        window = scaling.original_max_position_embeddings
        return config.head_dim * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float64)
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return torch.lerp(frequencies, frequencies / scaling.factor, stretched), scaling.yarn_attention_factor


def _longrope(
    frequencies: Tensor, scaling: RopeScaling, config: TextConfig, lengths_N: Tensor | None
) -> tuple[Tensor, float]:
    """Ding et al. 2024: a divisor for each pair, others for sequences that are longer than the original window."""
    assert lengths_N is not None
    original, attention_factor = scaling.original_max_position_embeddings, scaling.attention_factor
    short, long = (
        frequencies / torch.tensor(factors, dtype=torch.float64, device=frequencies.device)
        for factors in (scaling.short_factor, scaling.long_factor)
    )
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    return torch.where((lengths_N > original)[:, None], long, short), attention_factor


RULES: Mapping[str, Callable[[Tensor, RopeScaling, TextConfig, Tensor | None], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""By `rope_type`."""
