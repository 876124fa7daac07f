"""The vision tower: a tile of pixels -> features of its patches, merged by the adapter.

Shapes: n tiles, A side of a tile in pixels, P patches of a tile, L = P + 1 with the class token, W width of the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama4.errors import Llama4Error
from llama4.progress import track
from llama4.vision.config import VisionConfig
from llama4.vision.linear import TowerLinear
from llama4.vision.projector import VisionAdapter
from llama4.vision.rope import rotate_both, rotation_2d


def run(layer: nn.Module, *inputs: Any) -> Tensor:
    """The output of a layer."""
    out: Tensor = layer(*inputs)
    return out


def run_recomputed(layer: nn.Module, *inputs: Any) -> Tensor:
    """The same with activation checkpointing: where gradients are recorded, activations inside the layer are not kept
    but computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return run(layer, *inputs)
    out: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    return out


class PatchEmbedding(nn.Module):
    """Unfold the tile into patches, channel by channel, and map each linearly, without bias."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.linear = TowerLinear(config.num_channels * config.patch_size**2, config.hidden_size, bias=False)

    def forward(self, pixels_n3AA: Tensor) -> Tensor:
        patches = F.unfold(pixels_n3AA, self.patch_size, stride=self.patch_size)
        out: Tensor = self.linear(patches.transpose(1, 2))
        return out


class Projections(nn.Module):
    """The matrices of attention."""

    def __init__(self, config: VisionConfig, bias: bool) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (TowerLinear(width, width, bias) for _ in range(4))


class VisionAttention(Projections):
    """Full attention among the patches of one tile, with 2-D RoPE; all four projections have biases.

    Attributes:
        rotate: `rotate_both`, or a faster way that gives the same.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config, bias=True)
        self.rotate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotate_both

    def forward(self, x_nLW: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (
            projection(x_nLW).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotate(q, k, rotation)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class VisionMLP(nn.Module):
    """Linear, exact GELU, linear; both with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = TowerLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = TowerLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


Place = TypeVar("Place")
"""What attention is told of where patches are."""


class VisionLayer(nn.Module, Generic[Place]):
    """One pre-norm transformer block of a tower."""

    attention: ClassVar[type[nn.Module]] = VisionAttention

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = self.attention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """
        Args:
            x: patches as the block's attention takes them: [n, L, W] of tiles that are seen one by one, or those of all
                tiles of a picture, in one row.
            place: of the first, the rotation of each patch; of the second, how many are no padding.
        """
        x = x + self.self_attn(self.input_layernorm(x), place)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class VisionEncoder(nn.Module):
    """The stack of transformer blocks.

    Attributes:
        run_layer: `run`, or `run_recomputed` in training that saves memory.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer[Tensor](config) for _ in range(config.num_hidden_layers))
        self.run_layer: Callable[..., Tensor] = run

    def forward(self, x_nLW: Tensor, rotation: Tensor) -> Tensor:
        for layer in track(self.layers):
            x_nLW = self.run_layer(layer, x_nLW, rotation)
        return x_nLW


class VisionModel(nn.Module):
    """Tiles [n, 3, A, A], normalised -> image features [n, tokens_per_tile, vision_output_dim].

    Module names are those of Hugging Face's checkpoints below `vision_model.`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(config.num_patches + 1, config.hidden_size))
        self.layernorm_pre = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.model = VisionEncoder(config)
        self.layernorm_post = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.vision_adapter = VisionAdapter(config)

    def set_run_layer(self, run_layer: Callable[..., Tensor]) -> None:
        self.model.run_layer = run_layer

    def set_rotate(self, rotate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """See `VisionAttention`."""
        for module in self.modules():
            if isinstance(module, VisionAttention):
                module.rotate = rotate

    def encode(self, pixels_n3AA: Tensor) -> Tensor:
        """Features of the single patches, before the adapter: [n, P, W]."""
        x_nPW = self.patch_embedding(pixels_n3AA)
        class_token = self.class_embedding.to(x_nPW.dtype).expand(len(x_nPW), 1, -1)
        x_nLW = self.layernorm_pre(torch.cat([x_nPW, class_token], dim=1) + self.positional_embedding_vlm)
        precision = torch.promote_types(self.class_embedding.dtype, torch.float32)
        rotation = rotation_2d(self.config, x_nLW.device, precision)[:, None, :]
        out: Tensor = self.layernorm_post(self.model(x_nLW, rotation))[:, :-1]
        return out

    def forward(self, pixels_n3AA: Tensor) -> Tensor:
        """Features of tiles.

        Args:
            pixels_n3AA: [n, 3, A, A], normalised, of any floating-point dtype; A is `config.image_size`.

        Returns:
            [n, tokens_per_tile, vision_output_dim], of the tower's dtype.

        Raises:
            Llama4Error: tiles of another shape.
        """
        side = self.config.image_size
        if pixels_n3AA.ndim != 4 or pixels_n3AA.shape[1:] != (self.config.num_channels, side, side):
            raise Llama4Error(f"pixel_values must be [tiles, 3, {side}, {side}], not {list(pixels_n3AA.shape)}")
        pixels = pixels_n3AA.to(self.class_embedding.dtype)
        out: Tensor = self.vision_adapter(self.encode(pixels))
        return out
