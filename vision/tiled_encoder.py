"""Llama 3.2's vision tower: the tiles of one picture, seen together -> features of their patches.

Local layers, then global ones with gates; what some local layers gave stands beside the last global one's output.
Source: `VisionEncoder` in models/llama3/multimodal/model.py of Meta's llama-models.

A picture is always `max_tiles` tiles, of which those behind its own are empty, and every tile's patches are filled up
to a multiple of 8. What is empty sees only what is not, but is seen by all, as in training.

Shapes: m pictures, n tiles of a picture, A side of a tile in pixels, P patches of a tile, L = P + 1 with the class
token, S tokens of a picture with the empty ones, W width of the tower, D hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.errors import Llama4Error
from llama4.progress import track
from llama4.vision.encoder import Projections, VisionLayer, run
from llama4.vision.tiled_config import TiledVisionConfig

MULTIPLE = 8
"""Patches of a tile are filled up to a multiple of this."""


class TiledAttention(Projections):
    """Full attention among the patches of all tiles, without biases; the first `filled` tokens are no padding."""

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__(config, bias=False)

    def forward(self, x_SW: Tensor, filled: int) -> Tensor:
        q, k, v = (
            projection(x_SW).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)[None]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        of_filled = F.scaled_dot_product_attention(q[:, :, :filled], k, v)
        of_empty = F.scaled_dot_product_attention(q[:, :, filled:], k[:, :, :filled], v[:, :, :filled])
        out: Tensor = self.o_proj(torch.cat((of_filled, of_empty), dim=2)[0].transpose(0, 1).flatten(1))
        return out


class LocalLayer(VisionLayer[int]):
    """One pre-norm transformer block, over all tiles."""

    attention = TiledAttention


class GlobalLayer(LocalLayer):
    """The same with gates: tanh of what is learned says how much each part adds."""

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__(config)
        self.gate_attn = nn.Parameter(torch.zeros(1))
        self.gate_ffn = nn.Parameter(torch.zeros(1))

    def forward(self, x_SW: Tensor, filled: int) -> Tensor:
        x_SW = x_SW + self.gate_attn.tanh() * self.self_attn(self.input_layernorm(x_SW), filled)
        out: Tensor = x_SW + self.gate_ffn.tanh() * self.mlp(self.post_attention_layernorm(x_SW))
        return out


class TiledEncoder(nn.Module):
    """A stack of blocks -> the output of each.

    Attributes:
        run_layer: `run`, or `run_recomputed` in training that saves memory.
    """

    def __init__(self, config: TiledVisionConfig, layer: type[LocalLayer], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(config) for _ in range(count))
        self.run_layer: Callable[..., Tensor] = run

    def forward(self, x_SW: Tensor, filled: int) -> list[Tensor]:
        outputs = []
        for layer in track(self.layers):
            x_SW = self.run_layer(layer, x_SW, filled)
            outputs.append(x_SW)
        return outputs


class GridEmbedding(nn.Module):
    """What is added to each tile for its place, of a picture whose tiles are arranged so."""

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__()
        self.shape = (config.max_tiles, 1, config.hidden_size)
        self.embedding = nn.Embedding(len(config.grids) + 1, config.max_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, grid: int) -> Tensor:
        """[n, 1, W]."""
        return self.gate.tanh() * self.embedding.weight[grid].view(self.shape)


class PositionEmbedding(nn.Module):
    """What is added to each patch for its place in its tile, and for that of its tile in the picture."""

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__()
        self.shape = (config.max_tiles, config.num_patches + 1, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(self.shape[1:]))
        self.tile_embedding = nn.Embedding(len(config.grids) + 1, config.max_tiles * self.embedding.numel())
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, grid: int) -> Tensor:
        """[n, L, W]."""
        gate = self.gate.tanh()
        return (1 - gate) * self.embedding + gate * self.tile_embedding.weight[grid].view(self.shape)


class TiledVisionModel(nn.Module):
    """Pictures as tiles -> features of their patches.

    Module names are those of Hugging Face's checkpoints below `vision_model.`.
    """

    def __init__(self, config: TiledVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = GridEmbedding(config)
        self.post_tile_positional_embedding = GridEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(config.hidden_size)
        self.layernorm_post = nn.LayerNorm(config.hidden_size)
        self.transformer = TiledEncoder(config, LocalLayer, config.num_hidden_layers)
        self.global_transformer = TiledEncoder(config, GlobalLayer, config.num_global_layers)

    def set_run_layer(self, run_layer: Callable[..., Tensor]) -> None:
        self.transformer.run_layer = self.global_transformer.run_layer = run_layer

    def forward(self, pixels_mn3AA: Tensor, grids: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            pixels_mn3AA: [m, n, 3, A, A], normalised, zeros in tiles that a picture does not have.
            grids: rows and columns of each picture's tiles, [m, 2].

        Returns:
            [m, n * L, vision_output_dim], zeros for tiles that a picture does not have.

        Raises:
            Llama4Error: tiles of another shape, or a grid that there is not.
        """
        config, side = self.config, self.config.image_size
        if pixels_mn3AA.ndim != 5 or pixels_mn3AA.shape[1:] != (config.max_tiles, config.num_channels, side, side):
            raise Llama4Error(
                f"pixel_values must be [pictures, {config.max_tiles}, 3, {side}, {side}], "
                f"not {list(pixels_mn3AA.shape)}"
            )
        arrangements = [(int(rows), int(cols)) for rows, cols in grids.tolist()]
        if len(arrangements) != len(pixels_mn3AA) or not set(arrangements) <= set(config.grids):
            raise Llama4Error(
                f"image_grids must be rows and columns of at most {config.max_tiles} tiles for each of "
                f"{len(pixels_mn3AA)} pictures, not {arrangements}"
            )
        pixels = pixels_mn3AA.to(self.class_embedding.dtype)
        return torch.stack([self.encode(*each_one) for each_one in zip(pixels, arrangements, strict=True)])

    def encode(self, pixels_n3AA: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of one picture, [n * L, vision_output_dim]."""
        x_nLW, id_ = self.embed(pixels_n3AA, grid)
        tiles, length = x_nLW.shape[:2]
        x_nLW = F.pad(x_nLW, (0, 0, 0, -length % MULTIPLE))
        tile_S = torch.arange(tiles, device=x_nLW.device).repeat_interleave(x_nLW.shape[1])
        patch_S = torch.arange(x_nLW.shape[1], device=x_nLW.device).repeat(tiles)
        is_filled_S = (tile_S < grid[0] * grid[1]) & (patch_S < length)
        order_S = torch.cat((is_filled_S.nonzero(), (~is_filled_S).nonzero())).squeeze(1)  # attention has no order
        filled = grid[0] * grid[1] * length
        local = self.transformer(x_nLW.flatten(0, 1)[order_S], filled)
        of_tiles_nW = self.post_tile_positional_embedding(id_)[:, 0]
        x_SW = self.layernorm_post(local[-1]) + of_tiles_nW[tile_S[order_S]]
        last = self.global_transformer(x_SW, filled)[-1]
        between = [local[i] for i in self.config.intermediate_layers]
        features = torch.cat((last, torch.stack(between, dim=-1).flatten(1)), dim=-1)[:filled]
        return F.pad(features, (0, 0, 0, tiles * length - filled))

    def embed(self, pixels_n3AA: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
        """Patches, class token and what says where they are, [n, L, W]; and the number of the grid."""
        id_ = 1 + self.config.grids.index(grid)
        x_nPW = self.patch_embedding(pixels_n3AA).flatten(2).transpose(1, 2)
        x_nPW = x_nPW + self.pre_tile_positional_embedding(id_)
        class_token = self.class_embedding.expand(len(x_nPW), 1, -1)
        x_nLW = torch.cat((class_token, x_nPW), dim=1) + self.gated_positional_embedding(id_)
        return self.layernorm_pre(x_nLW), id_
