"""Messages with images -> the tensors that the model reads.

Shapes: B rows, T columns, n tiles of all rows in order, A side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.families import family_of
from llama4.text.messages import Message, ParsedMessage, image_sources, read_messages
from llama4.text.prompt import Rendered, render
from llama4.text.tokenizer import Tokenizer
from llama4.vision.images import load_image
from llama4.vision.tiling import Tiles, tile_image, tokens_per_tile

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Inputs:
    """A batch for `Llama4Model.forward`."""

    input_ids: Tensor
    """[B, T] int64; short rows are filled with `<|finetune_right_pad|>`."""
    attention_mask: Tensor
    """[B, T] int64: 1 for tokens, 0 for padding."""
    pixel_values: Tensor | None
    """[n, 3, A, A] float32, or None if no row has an image."""


class Processor:
    """Text and images -> `Inputs`.

    Args:
        tokenizer: the model's.
        image_size: side of a tile in pixels; None for a text-only model.
        patch_size: side of the vision encoder's patches in pixels.
        pixel_shuffle_ratio: how much the adapter shrinks the grid of patches along each side.
        max_tiles: most tiles in an image's grid, not counting the global tile.
        mean, std: normalisation of the pixels, which are between 0 and 1.
        render_prompt: the family's prompt format.

    Raises:
        ValueError: image_size, patch_size and pixel_shuffle_ratio do not divide.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int | None = 336,
        patch_size: int = 14,
        pixel_shuffle_ratio: float = 0.5,
        max_tiles: int = 16,
        mean: float | tuple[float, float, float] = 0.5,
        std: float | tuple[float, float, float] = 0.5,
        render_prompt: Callable[..., Rendered] = render,
    ) -> None:
        if max_tiles < 1:
            raise ValueError(f"max_tiles is {max_tiles}; an image takes at least 1 tile")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tiles = max_tiles
        self.mean, self.std = mean, std
        self._render_prompt = render_prompt
        self.tokens_per_tile = tokens_per_tile(image_size, patch_size, pixel_shuffle_ratio) if image_size else 0

    @classmethod
    def from_config(cls, tokenizer: Tokenizer, config: Llama4Config) -> Processor:
        """The processor of a model with this configuration."""
        vision, render_prompt = config.vision, family_of(config).render
        if vision is None:
            return cls(tokenizer, image_size=None, render_prompt=render_prompt)
        return cls(
            tokenizer,
            vision.image_size,
            vision.patch_size,
            vision.pixel_shuffle_ratio,
            vision.max_tiles,
            vision.image_mean,
            vision.image_std,
            render_prompt,
        )

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        images: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        padding_side: PaddingSide = "left",
    ) -> Inputs:
        """One conversation, or a list of them, as one batch.

        Args:
            messages: dictionaries with "role" and "content"; see text/messages.py.
            images: for the parts `{"type": "image"}` without a source, in order, those of all conversations.
            tools: function schemas in OpenAI's form.
            add_generation_prompt: whether to end with the assistant's header.
            padding_side: where short rows are padded.

        Raises:
            ValueError: a message is not well formed, an image cannot be read, or there are more or fewer `images` than
                parts without one.
        """
        conversations = [read_messages(conversation) for conversation in _as_batch(messages)]
        placeholders = sum(source is None for row in conversations for source in image_sources(row))
        if placeholders != len(images or ()):
            raise ValueError(
                f"the messages have {placeholders} image parts without a picture, but images= holds "
                f"{len(images or ())}; give one for each"
            )
        given = iter(images or ())
        rows: list[list[int]] = []
        tiles: list[Tiles] = []
        for row in conversations:
            sources = [next(given) if source is None else source for source in image_sources(row)]
            row_tiles = [self.tile(source) for source in sources]
            rows.append(self.render(row, row_tiles, tools=tools, add_generation_prompt=add_generation_prompt).ids)
            tiles += row_tiles
        pixel_values = torch.cat([image.pixel_values for image in tiles]) if tiles else None
        return self._pad(rows, pixel_values, padding_side)

    def complete(self, text: str | Sequence[str], *, padding_side: PaddingSide = "left") -> Inputs:
        """Raw text, or a list of texts, after `<|begin_of_text|>`, for the model to continue.

        Raises:
            ValueError: there is no text.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(texts):
            raise ValueError("the prompt is empty; write the text that the model shall continue")
        return self._pad([[self.tokenizer.bos_id, *self.tokenizer.encode(each)] for each in texts], None, padding_side)

    def tile(self, source: Any) -> Tiles:
        """Read one image and cut it into tiles.

        Raises:
            ValueError: the image cannot be read, or the model reads text alone.
        """
        if self.image_size is None:
            raise ValueError(
                "this model reads text alone, but the messages hold an image; use a model with a vision tower"
            )
        return tile_image(load_image(source), self.image_size, self.max_tiles, self.mean, self.std)

    def render(
        self,
        messages: Sequence[Message | ParsedMessage],
        tiles: Sequence[Tiles] = (),
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """Token ids of one conversation whose images are already tiled, and which of them are the assistant's.

        Raises:
            ValueError: a message is not well formed, or there are more or fewer `tiles` than images.
        """
        return self._render_prompt(
            messages,
            self.tokenizer,
            grids=[(image.rows, image.cols) for image in tiles],
            tokens_per_tile=self.tokens_per_tile,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )

    def _pad(self, rows: Sequence[Sequence[int]], pixel_values: Tensor | None, side: PaddingSide) -> Inputs:
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}; it must be 'left' or 'right'")
        longest = max(map(len, rows))
        if all(len(row) == longest for row in rows):  # no padding, and no need of a padding token
            input_ids = torch.tensor(rows)
            return Inputs(input_ids, torch.ones_like(input_ids), pixel_values)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(len(row))
            input_ids[i, place] = torch.tensor(row)
            attention_mask[i, place] = 1
        return Inputs(input_ids, attention_mask, pixel_values)


def _as_batch(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Any]:
    """A list of conversations. Anything else is taken for one conversation, which `read_messages` checks."""
    if isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], (list, tuple)):
        return list(messages)
    return [messages]
