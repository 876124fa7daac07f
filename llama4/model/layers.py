"""The small parts of a decoder layer: RMSNorm, SwiGLU, RoPE, temperature.

Shapes: N tokens (the rows of a batch, one after the other, without padding), D hidden size, F width of an MLP,
H heads, C head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.config import TextConfig
from llama4.kernels import cpu
from llama4.ops.linear import Linear
from llama4.vision.encoder import rotate, unit_numbers

__all__ = [
    "FeedForward",
    "RMSNorm",
    "attention_temperature",
    "rms_normalise",
    "rope_frequencies",
    "rope_rotation",
    "swiglu",
    "turn",
]


def upcast(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 or better."""
    x = upcast(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight (Zhang & Sennrich 2019). Takes any dtype, gives that of the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and cpu.usable(len(self.weight), x, self.weight):
            return cpu.rms_norm(x, self.weight, self.eps)
        return (rms_normalise(x, self.eps) * self.weight).type_as(self.weight)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A dense layer's MLP, and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x_ND), self.up_proj(x_ND)))
        return out


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020); both may be halves of one tensor."""
    if gate_NF.ndim == 2 and cpu.usable(gate_NF.shape[1], gate_NF, up_NF):
        return cpu.swiglu(gate_NF, up_NF)
    return F.silu(gate_NF) * up_NF


def rope_frequencies(config: TextConfig) -> Tensor:
    """Radians per position of each of the C / 2 pairs, float64.

    theta^(-2i / C), lowered by `rope_scaling`. Rule "llama3" (Llama 3.1): wavelengths longer than original /
    low_freq_factor are stretched by `factor`, those shorter than original / high_freq_factor are kept, and in between
    the two are blended.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return stretched
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / max(high - low, 1e-30)).clamp(0, 1)
    return torch.lerp(stretched, frequencies, blend)


def rope_rotation(config: TextConfig, positions_N: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """The turns of RoPE at given positions as unit complex numbers, [N, C / 2], in the complex twin of `dtype`.

    In a chunked layer only tokens of one chunk see each other, and RoPE depends on differences alone, so the position
    inside the chunk serves as well as the absolute one. Its angle stays small: exact at ten million tokens, where a
    float32 angle of the absolute position is off by half a radian. Nothing is kept in a buffer that a cast of the
    module could round.
    """
    places = positions_N if window is None else positions_N % window
    angles = places.to(torch.float64)[:, None] * rope_frequencies(config).to(positions_N.device)
    return unit_numbers(angles, dtype)


def attention_temperature(config: TextConfig, positions_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor on queries of NoPE layers, [N]: 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)).

    After "Scalable-Softmax Is Superior for Attention" (Nakanishi 2025), as Llama 4 uses it; p counts in the token's
    own sequence.
    """
    steps = torch.div(positions_N + 1, config.floor_scale, rounding_mode="floor")
    return (torch.log1p(steps.to(torch.float64)) * config.attn_scale + 1.0).to(dtype)


def turn(
    q_NHC: Tensor, k_NKC: Tensor, rotation: Tensor | None, eps: float | None, temperature_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What positions do to queries and keys: RoPE, then QK-norm, then a temperature on the queries, each where it is
    given. In float32 or better, and back to their dtype."""
    if rotation is None and eps is None and temperature_N is None:
        return q_NHC, k_NKC
    if cpu.heads_usable(q_NHC, k_NKC):
        return cpu.apply_rope(q_NHC, rotation, eps, temperature_N), cpu.apply_rope(k_NKC, rotation, eps, None)
    q, k = q_NHC, k_NKC
    if rotation is not None:
        q, k = rotate(q, rotation[:, None]), rotate(k, rotation[:, None])
    if eps is not None:
        q, k = rms_normalise(q, eps), rms_normalise(k, eps)
    if temperature_N is not None:
        q = q * temperature_N[:, None, None]
    return q.type_as(q_NHC), k.type_as(k_NKC)
