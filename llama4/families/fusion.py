"""How the models of a family take pictures: as tokens of the prompt, and as tensors.

Shapes: m pictures, n tiles: of all pictures, or the most of one; A side of a tile in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor

from llama4.text.prompt import IMAGE, IMAGE_END, Piece, image_tokens
from llama4.text.tokenizer import Tokenizer
from llama4.vision.tiling import Tiles


class Fusion(ABC):
    """How pictures come to the text."""

    tiling: ClassVar[dict[str, Any]] = {}
    """Arguments of `tile_image`."""
    picture_end: ClassVar[str]
    """The last token that a picture stands for."""

    @abstractmethod
    def token_ids(self, rows: int, cols: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
        """What a picture of so many tiles stands for in a prompt."""

    @abstractmethod
    def tensors(self, pictures: Sequence[Tiles], max_tiles: int) -> tuple[Tensor | None, Tensor | None]:
        """`pixel_values` and `image_grids` of the model; nothing without pictures."""

    @abstractmethod
    def begun(self, prompt: list[Piece], bos: Piece) -> list[Piece]:
        """A raw prompt with its first token."""


class EarlyFusion(Fusion):
    """Llama 4: each tile, and a global one, stands as so many tokens in the prompt."""

    picture_end = IMAGE_END

    def token_ids(self, rows: int, cols: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
        return image_tokens(rows, cols, tokens_per_tile, tokenizer)

    def tensors(self, pictures: Sequence[Tiles], max_tiles: int) -> tuple[Tensor | None, Tensor | None]:
        """[n, 3, A, A], and no grids."""
        return (torch.cat([picture.pixel_values for picture in pictures]) if pictures else None), None

    def begun(self, prompt: list[Piece], bos: Piece) -> list[Piece]:
        return prompt if prompt[0] == bos else [bos, *prompt]


class SeenByCrossAttention(Fusion):
    """Llama 3.2 Vision: a picture is one token, and its tiles are seen by layers of cross-attention."""

    tiling: ClassVar[dict[str, Any]] = {"global_tile": False, "precision": torch.float64}
    picture_end = IMAGE

    def token_ids(self, rows: int, cols: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.special(IMAGE)]

    def tensors(self, pictures: Sequence[Tiles], max_tiles: int) -> tuple[Tensor | None, Tensor | None]:
        """[m, n, 3, A, A], zeros in tiles that a picture does not have, and rows and columns of each, [m, 2]."""
        if not pictures:
            return None, None
        first = pictures[0].pixel_values
        pixels = first.new_zeros(len(pictures), max_tiles, *first.shape[1:])
        for i, picture in enumerate(pictures):
            pixels[i, : len(picture.pixel_values)] = picture.pixel_values
        return pixels, torch.tensor([(picture.rows, picture.cols) for picture in pictures])

    def begun(self, prompt: list[Piece], bos: Piece) -> list[Piece]:
        """Pictures at the beginning come before the first token, as transformers' MllamaProcessor writes it."""
        if bos in prompt:
            return prompt
        count = len(list(takewhile(lambda piece: piece == Piece(IMAGE, special=True), prompt)))
        return [*prompt[:count], bos, *prompt[count:]]
