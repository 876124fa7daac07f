"""From the tower's patches to tokens of the decoder: pixel shuffle, adapter, projection.

Shapes: n tiles, P patches of a tile, Q = P * ratio^2 image tokens of a tile, W width of the tower, D hidden size of the
decoder.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llama4.vision.config import VisionConfig
from llama4.vision.linear import TowerLinear


def pixel_shuffle(x_nPW: Tensor, ratio: float) -> Tensor:
    """Merge every square of 1/ratio x 1/ratio neighbouring patches into one token with 1/ratio^2 times the channels.

    [n, P, W] -> [n, P * ratio^2, W / ratio^2]. Channels of a merged token run over its patches row by row, as in
    InternVL's pixel shuffle, from which Llama 4 took it.
    """
    n, P, W = x_nPW.shape
    side, factor = round(P**0.5), round(1 / ratio)
    merged = side // factor
    squares = x_nPW.view(n, merged, factor, merged, factor, W).transpose(2, 3)
    return squares.reshape(n, merged * merged, factor * factor * W)


class AdapterMLP(nn.Module):
    """Two linear layers, an exact GELU after each, no biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = TowerLinear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = TowerLinear(config.projector_output_dim, config.projector_output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    """Pixel shuffle and its MLP: [n, P, W] -> [n, Q, vision_output_dim]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.pixel_shuffle_ratio = config.pixel_shuffle_ratio
        self.mlp = AdapterMLP(config)

    def forward(self, x_nPW: Tensor) -> Tensor:
        out: Tensor = self.mlp(pixel_shuffle(x_nPW, self.pixel_shuffle_ratio))
        return out


class Projector(nn.Module):
    """Image features -> embeddings of the decoder, without bias: [..., vision_output_dim] -> [..., D]."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = TowerLinear(config.vision_output_dim, hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear_1(features)
        return out
