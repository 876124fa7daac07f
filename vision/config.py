"""The shape of the vision tower and of the images that it sees, in Hugging Face's field names."""

from __future__ import annotations

from dataclasses import dataclass

from llama4.errors import Llama4Error

RESAMPLE = {"nearest-exact": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Filters that resize pictures, and PIL's numbers of them, which files have."""


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower, adapter and image preparation of a Llama 4 model. The defaults are those of every released model.

    From `max_tiles` on, fields come from the image processor's file (there `max_patches`), those before from the
    `vision_config` of `config.json`, but for `norm_eps`, which is the same in all models.
    """

    hidden_size: int = 1408
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    """Width of the tower's MLPs, and of the adapter's input: it must equal hidden_size / pixel_shuffle_ratio^2."""
    vision_output_dim: int = 4096
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    image_size: int = 336
    """Side of a tile, in pixels."""
    patch_size: int = 14
    num_channels: int = 3
    pixel_shuffle_ratio: float = 0.5
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_tiles: int = 16
    resize_to_max_canvas: bool = False
    """Whether pictures are enlarged to the most tiles that they fill, not at most to one tile's side."""
    resample: str = "bilinear"
    """One of `RESAMPLE`."""
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "image_size", "patch_size", "max_tiles"):
            if getattr(self, name) < 1:
                raise Llama4Error(f"vision {name} must be at least 1, not {getattr(self, name)}")
        if not 0.01 <= self.pixel_shuffle_ratio <= 1:
            raise Llama4Error(f"pixel_shuffle_ratio must be from 0.01 to 1, not {self.pixel_shuffle_ratio}")
        if not len(self.image_mean) == len(self.image_std) == 3 or 0 in self.image_std:
            raise Llama4Error(
                "image_mean and image_std must have a number for each of 3 channels, and what pixels are divided by "
                f"cannot be 0: {self.image_mean}, {self.image_std}"
            )
        if self.resample not in RESAMPLE:
            raise Llama4Error(f"resample {self.resample!r} is not known; choose one of {', '.join(RESAMPLE)}")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise Llama4Error(
                f"vision hidden_size {self.hidden_size} over {self.num_attention_heads} heads must give a head width "
                "that is a multiple of 4 (two coordinates, each rotated in pairs)"
            )
        if self.image_size % self.patch_size or not (self.grid_size * self.pixel_shuffle_ratio).is_integer():
            raise Llama4Error(
                f"a tile of {self.image_size} pixels does not divide into patches of {self.patch_size} that a pixel "
                f"shuffle of {self.pixel_shuffle_ratio} can merge"
            )
        if round(self.hidden_size / self.pixel_shuffle_ratio**2) != self.intermediate_size:
            raise Llama4Error(
                f"vision intermediate_size {self.intermediate_size} must be hidden_size / pixel_shuffle_ratio^2 = "
                f"{round(self.hidden_size / self.pixel_shuffle_ratio**2)}: the adapter's first layer has that input"
            )
        if not self.projector_input_dim == self.projector_output_dim == self.vision_output_dim:
            raise Llama4Error(
                f"projector_input_dim {self.projector_input_dim}, projector_output_dim {self.projector_output_dim} and "
                f"vision_output_dim {self.vision_output_dim} must be equal"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile, without the class token."""
        return self.grid_size**2

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes in the decoder's sequence."""
        return round(self.num_patches * self.pixel_shuffle_ratio**2)

    @property
    def keys_per_tile(self) -> int:
        """Keys of a tile in layers of cross-attention; 0 in models without such layers."""
        return 0

    def activation_bytes(self, size: int) -> float:
        """Bytes that a tile takes while it goes through a layer of the tower, without gradients.

        They are of the residual stream, its norm and what is added to it; and of queries and keys before and after
        RoPE, values, and the output by head and by token, or of what the MLP's GELU takes and gives.

        Args:
            size: bytes of a number in the model's dtype.
        """
        between = max(7 * self.hidden_size, 2 * self.intermediate_size)
        return size * (self.num_patches + 1) * (3 * self.hidden_size + between)

    def num_parameters(self) -> int:
        """Parameters of the tower and the adapter, without the projection into the decoder."""
        width, mlp, out = self.hidden_size, self.intermediate_size, self.vision_output_dim
        attention = 4 * (width * width + width)
        layer = attention + 2 * width * mlp + mlp + width + 4 * width
        patches = self.num_channels * self.patch_size**2 * width
        embeddings = width + (self.num_patches + 1) * width + 4 * width
        return patches + embeddings + self.num_hidden_layers * layer + mlp * out + out * out

    def projection_parameters(self, hidden_size: int) -> int:
        """Parameters of the projection into a decoder of this width."""
        return self.vision_output_dim * hidden_size
