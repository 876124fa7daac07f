"""The shape of Llama 3.2's vision tower, whose layers see all tiles of a picture at once."""

from __future__ import annotations

from dataclasses import dataclass

from llama4.errors import Llama4Error
from llama4.vision.config import VisionConfig


def grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """The arrangements (rows, cols) of at most so many tiles, in the order of the rows of the embeddings that tell them
    apart; row 0 is of no picture."""
    sides = range(1, max_tiles + 1)
    return tuple((rows, cols) for rows in sides for cols in sides if rows * cols <= max_tiles)


@dataclass(frozen=True)
class TiledVisionConfig(VisionConfig):
    """Vision tower and image preparation of Llama 3.2 Vision. The defaults are those of every released model.

    There is no pixel shuffle and no adapter; a picture is one token of the text, and what layers of cross-attention see
    of it are all patches of its tiles.
    """

    hidden_size: int = 1280
    num_hidden_layers: int = 32
    """Of the local layers; only the global ones have gates."""
    num_global_layers: int = 8
    intermediate_size: int = 5120
    intermediate_layers: tuple[int, ...] = (2, 6, 14, 22, 29)
    """Local layers whose outputs stand beside that of the last global one."""
    vision_output_dim: int = 7680
    image_size: int = 560
    pixel_shuffle_ratio: float = 1.0
    max_tiles: int = 4

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_attention_heads",
            "image_size",
            "patch_size",
            "max_tiles",
            "num_global_layers",
        ):
            if getattr(self, name) < 1:
                raise Llama4Error(f"vision {name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise Llama4Error(
                f"vision hidden_size {self.hidden_size} must be a multiple of its {self.num_attention_heads} heads"
            )
        if self.image_size % self.patch_size:
            raise Llama4Error(f"a tile of {self.image_size} pixels does not divide into patches of {self.patch_size}")
        if not all(0 <= i < self.num_hidden_layers for i in self.intermediate_layers):
            raise Llama4Error(
                f"intermediate_layers {self.intermediate_layers} name layers beyond the {self.num_hidden_layers} local "
                "ones"
            )
        if self.vision_output_dim != (wanted := self.hidden_size * (1 + len(self.intermediate_layers))):
            raise Llama4Error(
                f"vision_output_dim {self.vision_output_dim} must be {wanted}: hidden_size for the last layer and for "
                "each of intermediate_layers"
            )

    @property
    def tokens_per_tile(self) -> int:
        """A picture is one token, however many tiles it has."""
        return 1

    @property
    def keys_per_tile(self) -> int:
        """Patches of a tile and its class token: what layers of cross-attention see of it."""
        return self.num_patches + 1

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return grids(self.max_tiles)

    def num_parameters(self) -> int:
        """Parameters of the tower, without the projection into the decoder."""
        width, mlp, patches = self.hidden_size, self.intermediate_size, self.num_patches + 1
        layer = 4 * width * width + 2 * width * mlp + mlp + width + 4 * width
        layers = (self.num_hidden_layers + self.num_global_layers) * layer + 2 * self.num_global_layers
        of_tiles = (len(self.grids) + 1) * self.max_tiles * width
        positions = patches * width + of_tiles * patches + 1
        embeddings = self.num_channels * self.patch_size**2 * width + width + positions + 2 * (of_tiles + 1) + 4 * width
        return embeddings + layers

    def projection_parameters(self, hidden_size: int) -> int:
        return (self.vision_output_dim + 1) * hidden_size
