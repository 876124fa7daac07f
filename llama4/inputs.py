"""Messages with images -> the tensors that the model reads.

Shapes: B rows, T columns, n tiles of all rows in order, or the most of each of m pictures, A side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.errors import ArgumentError, ChatTemplateError, ImageError, Llama4Error
from llama4.families import family_of
from llama4.families.fusion import EarlyFusion, Fusion
from llama4.text import chat_formats
from llama4.text.messages import (
    ImagePart,
    Message,
    ParsedMessage,
    image_places,
    image_sources,
    is_continued,
    read_messages,
)
from llama4.text.prompt import IMAGE, Piece, Rendered, check_images, compose, encode, read_pieces
from llama4.text.prompt_limit import PromptLimit
from llama4.text.template import ChatTemplate
from llama4.text.template_agreement import Compose, agrees
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import INFILLING
from llama4.units import bytes_text
from llama4.vision.images import load_image
from llama4.vision.limits import LIMITS, ImageLimits
from llama4.vision.tiling import Tiles, tile_image, tokens_per_tile

PaddingSide = Literal["left", "right"]
_TENSOR_OPTIONS = {
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
}
"""What transformers' `apply_chat_template` takes and ours does not."""


@dataclass(frozen=True)
class Inputs:
    """A batch for `Llama4Model.forward`."""

    input_ids: Tensor
    """[B, T] int64; short rows are filled with `<|finetune_right_pad|>`."""
    attention_mask: Tensor
    """[B, T] int64: 1 for tokens, 0 for padding."""
    pixel_values: Tensor | None
    """[n, 3, A, A] float32, or None if no row has an image; with layers of cross-attention [m, n, 3, A, A]."""
    image_grids: Tensor | None = None
    """[m, 2] int64, of such models: rows and columns of each picture's tiles."""


class Processor:
    """Text and images -> `Inputs`.

    Args:
        tokenizer: the model's.
        image_size: side of a tile in pixels; None for a text-only model.
        patch_size: side of the vision encoder's patches in pixels.
        pixel_shuffle_ratio: how much the adapter shrinks the grid of patches along each side.
        max_tiles: most tiles in an image's grid, not counting the global tile.
        mean, std: normalisation of the pixels, which are between 0 and 1.
        resize_to_max_canvas, resample, rescale_factor: see `tile_image`.
        fusion: how the family's models take pictures.
        compose: the family's prompt format; None for a model of which nothing says that it chats.
        template: the checkpoint's own; it is used unless it writes what the family's does.

    Attributes:
        image_limits: what reading a picture may cost, and where one may come from. Set it to change these.

    Raises:
        Llama4Error: image_size, patch_size and pixel_shuffle_ratio do not divide.
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
        compose: Compose | None = compose,
        template: ChatTemplate | None = None,
        *,
        resize_to_max_canvas: bool = False,
        resample: str = "bilinear",
        rescale_factor: float = 1 / 255,
        fusion: Fusion | None = None,
    ) -> None:
        if max_tiles < 1:
            raise ArgumentError(f"max_tiles is {max_tiles}; an image takes at least 1 tile")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tiles = max_tiles
        self.mean, self.std = mean, std
        self.resize_to_max_canvas = resize_to_max_canvas
        self.resample = resample
        self.rescale_factor = rescale_factor
        self.template = template
        self.fusion = fusion or EarlyFusion()
        self.image_limits: ImageLimits = LIMITS
        self._compose = compose
        self.tokens_per_tile = tokens_per_tile(image_size, patch_size, pixel_shuffle_ratio) if image_size else 0

    @classmethod
    def from_config(
        cls,
        tokenizer: Tokenizer,
        config: Llama4Config,
        templates: Mapping[str, str] | None = None,
        chat_format: str | None = None,
    ) -> Processor:
        """The processor of a model with this configuration, and with a checkpoint's own chat templates, if any. The
        format that is named counts more than those.

        Raises:
            ArgumentError: an unknown format.
        """
        vision, family = config.vision, family_of(config)
        compose = family.chat_format(config, tokenizer)
        if chat_format is not None:
            templates, compose = None, chat_formats.chat_format(chat_format)
        template = ChatTemplate(templates, tokenizer) if templates else None
        if vision is None:
            return cls(tokenizer, image_size=None, compose=compose, template=template)
        return cls(
            tokenizer,
            vision.image_size,
            vision.patch_size,
            vision.pixel_shuffle_ratio,
            vision.max_tiles,
            vision.image_mean,
            vision.image_std,
            compose,
            template,
            resize_to_max_canvas=vision.resize_to_max_canvas,
            resample=vision.resample,
            rescale_factor=vision.rescale_factor,
            fusion=family.fusion,
        )

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        images: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        padding_side: PaddingSide = "left",
        limit: PromptLimit | None = None,
    ) -> Inputs:
        """One conversation, or a list of them, as one batch.

        Args:
            messages: dictionaries with "role" and "content"; see text/messages.py.
            images: for the parts `{"type": "image"}` without a source, in order, those of all conversations.
            tools: function schemas in OpenAI's form.
            add_generation_prompt: whether to end with the assistant's header.
            continue_final_message: whether to end within the last message instead, for the model to continue it; None
                does so if it is the assistant's and calls no tools.
            chat_template_kwargs: further variables of the prompt's format: what the checkpoint's own template reads
                (`date_string`, `documents`), or of Llama 4's own `tools_in_user_message`, which is True.
            padding_side: where short rows are padded.
            limit: how many tokens a prompt may have, so that one that surely has more is not read.

        Raises:
            ContextLengthError: a prompt surely has more tokens than `limit` allows.
            Llama4Error: a message is not well formed, an image cannot be read, or there are more or fewer `images` than
                parts without one; `ChatTemplateError` if the checkpoint's own template fails.
        """
        rows: list[list[int]] = []
        tiles: list[Tiles] = []
        for row, row_tiles in self._tiled(messages, images):
            continued = continue_final_message
            if continued is None:
                continued = add_generation_prompt and is_continued(row)
            pieces = self._pieces(
                row,
                chat_template_kwargs,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continued,
            )
            rows.append(self._encode(pieces, row_tiles, limit).ids)
            tiles += row_tiles
        return self._pad(rows, tiles, padding_side)

    def apply_chat_template(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        images: Sequence[Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        chat_template: str | None = None,
        **chat_template_kwargs: Any,
    ) -> Any:
        """A conversation as the text of its prompt or as its token ids; a list of conversations as a list of them.

        The names and defaults of arguments are those of transformers' processors.

        Args:
            messages, images, tools, add_generation_prompt, continue_final_message, chat_template_kwargs: as in a call
                of the processor.
            tokenize: ids, with those of each image, which is read; else the text, with `<|image|>` for each.
            chat_template: another template than the checkpoint's default: the name of one that it has, or its source.

        Raises:
            Llama4Error: as a call of the processor; or both `add_generation_prompt` and `continue_final_message`.
        """
        if add_generation_prompt and continue_final_message:
            raise ArgumentError(
                "add_generation_prompt begins a message and continue_final_message goes on with the last; choose one"
            )
        if unknown := sorted(chat_template_kwargs.keys() & _TENSOR_OPTIONS):
            raise ArgumentError(f"{', '.join(unknown)} cannot be given here; call the processor itself for tensors")
        options: dict[str, Any] = {
            "chat_template": chat_template,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if tokenize:
            results: list[Any] = [
                self._encode(self._pieces(row, chat_template_kwargs, **options), tiles).ids
                for row, tiles in self._tiled(messages, images)
            ]
        else:
            conversations = (read_messages(conversation) for conversation in _as_batch(messages))
            rows = (self._pieces(row, chat_template_kwargs, **options) for row in conversations)
            results = ["".join(piece.text for piece in row) for row in rows]
        return results if _is_batch(messages) else results[0]

    def complete(
        self,
        text: str | Sequence[str],
        *,
        images: Sequence[Any] = (),
        special_tokens: bool = False,
        padding_side: PaddingSide = "left",
        limit: PromptLimit | None = None,
    ) -> Inputs:
        """Raw text, or a list of texts, for the model to continue, after the tokenizer's first token if it puts one.

        Args:
            images: with `special_tokens`, one for each `<|image|>` in the texts.
            special_tokens: the texts are prompts rendered already: names of special tokens in them are these tokens,
                and no second `<|begin_of_text|>` is put before them.
            limit: as in a call of the processor.

        Raises:
            ContextLengthError: as a call of the processor.
            Llama4Error: there is no text, or there are more or fewer images than places for them.
        """
        texts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
        if not all(isinstance(each, str) for each in texts):
            raise ArgumentError(f"text is {text!r:.80}; it must be a text, or a list of texts")
        if not texts or not all(texts):
            raise Llama4Error("the prompt is empty; write the text that the model shall continue")
        prompts = [read_pieces(each, self.tokenizer) if special_tokens else [Piece(each)] for each in texts]
        bos, image = Piece(self.tokenizer.bos, special=True), Piece(IMAGE, special=True)
        counts = [prompt.count(image) for prompt in prompts]
        check_images(sum(counts), len(images))
        tiles = [self.tile(source) for source in images]
        remaining = iter(tiles)
        if self.tokenizer.adds_bos:
            prompts = [self.fusion.begun(prompt, bos) for prompt in prompts]
        rows = [
            self._encode(prompt, [next(remaining) for _ in range(count)], limit).ids
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        return self._pad(rows, tiles, padding_side)

    def infill(self, prefix: str, suffix: str, *, limit: PromptLimit | None = None) -> Inputs:
        """What comes before and after a gap, for a model to fill it, as Code Llama was trained.

        Source: `infilling_prompt_tokens` in llama/generation.py of Meta's Code Llama.

        Args:
            limit: as in a call of the processor.

        Raises:
            ContextLengthError: as a call of the processor.
            Llama4Error: the tokenizer has no tokens for that.
        """
        if INFILLING.prefix not in self.tokenizer.special_tokens:
            raise Llama4Error(
                f"{self.tokenizer.path} has no tokens for infilling; Code Llama's of 7B and 13B have them"
            )
        before, after, middle, _ = (Piece(name, special=True) for name in INFILLING)
        begin = Piece(self.tokenizer.bos, special=True)
        pieces = [begin, before, Piece(prefix), after, Piece(suffix, blank=False), middle]
        ids = encode((piece for piece in pieces if piece.text), self.tokenizer, limit=limit).ids
        return self._pad([ids], (), "left")

    def read(self, messages: Sequence[Message]) -> tuple[list[ParsedMessage], list[Tiles]]:
        """One conversation, checked, with the tiles of its images.

        Raises:
            Llama4Error: as a call of the processor.
        """
        ((row, tiles),) = self._tiled(messages, None)
        return row, tiles

    def pack(self, pieces: Sequence[Piece], tiles: Sequence[Tiles], limit: PromptLimit | None = None) -> Inputs:
        """A prompt in whatever format, with the tiles of its images.

        Args:
            limit: as in a call of the processor.

        Raises:
            ContextLengthError: as a call of the processor.
            Llama4Error: there are more or fewer tiles than places for images; the tokenizer lacks a special token.
        """
        return self._pad([self._encode(pieces, tiles, limit).ids], tiles, "left")

    def tile(self, source: Any) -> Tiles:
        """Read one image and cut it into tiles.

        Raises:
            Llama4Error: the image cannot be read, or the model reads text alone.
        """
        if self.image_size is None:
            raise ImageError(
                "this model reads text alone, but the messages hold an image; use a model with a vision tower"
            )
        return tile_image(
            load_image(source, self.image_limits),
            self.image_size,
            self.max_tiles,
            self.mean,
            self.std,
            resize_to_max_canvas=self.resize_to_max_canvas,
            resample=self.resample,
            rescale_factor=self.rescale_factor,
            **self.fusion.tiling,
        )

    def render(
        self,
        messages: Sequence[Message | ParsedMessage],
        tiles: Sequence[Tiles] = (),
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Token ids of one conversation whose images are already tiled, and which of them are the assistant's.

        Raises:
            Llama4Error: a message is not well formed, or there are more or fewer `tiles` than images.
        """
        pieces = self._pieces(
            messages,
            chat_template_kwargs,
            mark_replies=True,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self._encode(pieces, tiles)

    def _tiled(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], images: Sequence[Any] | None
    ) -> Iterator[tuple[list[ParsedMessage], list[Tiles]]]:
        """Each conversation with the tiles of its images."""
        conversations = [read_messages(conversation) for conversation in _as_batch(messages)]
        placeholders = sum(source is None for row in conversations for source in image_sources(row))
        if placeholders != len(images or ()):
            parts = "1 image part" if placeholders == 1 else f"{placeholders} image parts"
            raise Llama4Error(
                f"the messages have {parts} without a picture, but images= of the processor holds {len(images or ())}; "
                'put each picture into its part: {"type": "image", "image": ...}'
            )
        given = iter(images or ())
        for row in conversations:
            tiles: list[Tiles] = []
            left = self.image_limits.max_prepared
            for message, part in image_places(row):
                tiles.append(self._tile_of(message, part, row, given))
                left -= tiles[-1].pixel_values.nbytes
                if left < 0:
                    most = bytes_text(int(self.image_limits.max_prepared))
                    error = ImageError(f"the pictures take more than {most} as the model reads them; send fewer")
                    error.place = message, part
                    raise error
            yield row, tiles

    def _tile_of(self, message: int, part: int, row: Sequence[ParsedMessage], given: Iterator[Any]) -> Tiles:
        """The tiles of one image of a conversation; an error says which."""
        image = row[message].parts[part]
        assert isinstance(image, ImagePart)
        try:
            return self.tile(next(given) if image.source is None else image.source)
        except ImageError as error:
            error.place = message, part
            raise

    def _pieces(
        self,
        messages: Sequence[Message | ParsedMessage],
        variables: Mapping[str, Any] | None,
        *,
        mark_replies: bool = False,
        chat_template: str | None = None,
        **options: Any,
    ) -> list[Piece]:
        """A prompt in the family's format, or in that of the checkpoint's own template."""
        variables = {} if variables is None else variables
        if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
            raise ArgumentError(f"chat_template_kwargs is {variables!r:.80}; it must be a dictionary of names")
        variables = dict(variables)
        if reserved := sorted(variables.keys() & {"self", "messages", "mark_replies", "bos", *options}):
            raise ArgumentError(
                f"chat_template_kwargs holds {', '.join(reserved)}, which other arguments say; leave it out"
            )
        others = sorted(variables.keys() - {"tools_in_user_message"})
        template = self.template
        if chat_template is not None:
            template = (template or ChatTemplate({}, self.tokenizer)).named(chat_template)
        if template is not None and (others or chat_template is not None or not self.template_agrees):
            pieces = template.compose(messages, mark_replies=mark_replies, **options, **variables)
            places = sum(piece.special and piece.text == IMAGE for piece in pieces)
            if places != (wanted := len(image_sources(read_messages(messages)))):
                raise ChatTemplateError(
                    f"the checkpoint's chat template writes {places} {IMAGE} for the {wanted} images in these messages"
                    + ("; chat_template_kwargs={'tools_in_user_message': False} may help" if options["tools"] else "")
                )
            return pieces
        if others:
            raise Llama4Error(
                f"{', '.join(others)} cannot be given, as this checkpoint has no chat template that reads such; what "
                "Llama 4's own format reads is tools_in_user_message"
            )
        if self._compose is None:
            raise Llama4Error(
                "this model has no chat template, and nothing says that it was trained to chat: continue a text with "
                "complete(text) or `generate --raw`, or name its format: "
                f"chat_format={' or '.join(map(repr, chat_formats.CHAT_FORMATS))}"
            )
        return self._compose(messages, bos=self.tokenizer.bos, **options, **variables)

    @property
    def chats(self) -> bool:
        """Whether there is a format for conversations."""
        return self.template is not None or self._compose is not None

    @cached_property
    def template_agrees(self) -> bool:
        """Whether the checkpoint's own template writes what the family's format does, so that this is used."""
        if self.template is None or self._compose is None:
            return self.template is None
        return agrees(self.template, self._compose, self.tokenizer.bos)

    def _encode(self, pieces: Sequence[Piece], tiles: Sequence[Tiles], limit: PromptLimit | None = None) -> Rendered:
        grids = [(image.rows, image.cols) for image in tiles]
        return encode(pieces, self.tokenizer, grids, self.tokens_per_tile, self.fusion.token_ids, limit)

    def _pad(self, rows: Sequence[Sequence[int]], tiles: Sequence[Tiles], side: PaddingSide) -> Inputs:
        if side not in ("left", "right"):
            raise ArgumentError(f"padding_side is {side!r}; it must be 'left' or 'right'")
        pictures = self.fusion.tensors(tiles, self.max_tiles)
        longest = max(map(len, rows))
        if all(len(row) == longest for row in rows):  # no padding, and no need of a padding token
            input_ids = torch.tensor(rows)
            return Inputs(input_ids, torch.ones_like(input_ids), *pictures)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(len(row))
            input_ids[i, place] = torch.tensor(row)
            attention_mask[i, place] = 1
        return Inputs(input_ids, attention_mask, *pictures)


def _is_batch(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> bool:
    """Whether this is a list of conversations. Anything else is taken for one, which `read_messages` checks."""
    return isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], (list, tuple))


def _as_batch(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Any]:
    return list(messages) if _is_batch(messages) else [messages]
