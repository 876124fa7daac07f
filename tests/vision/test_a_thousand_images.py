"""Images of a thousand sizes, in all modes, against both references: from the file to canvas, tokens and pixels."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import llama_models.llama4.tokenizer as meta
import pytest
import torch
from llama_models.llama4.preprocess import ResizeNormalizeImageTransform, VariableSizeImageTransform
from PIL import Image, ImageOps
from transformers import Llama4ImageProcessor
from transformers.models.llama4.processing_llama4 import Llama4Processor

from llama4.text.prompt import image_tokens
from llama4.text.tokenizer import Tokenizer
from llama4.vision.images import load_image
from llama4.vision.tiling import best_canvas, tile_image
from tests.meta_chat import TransformedImage, chat_format

MODES = ["RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1"]
TILE, MAX_TILES = 28, 16
MOST_PIXELS = 100_000
"""Of larger images, only canvas and tokens are compared: the rest is a matter of size alone."""


def sizes() -> Iterator[tuple[int, int]]:
    """Sides from 1 to 5000, as many between 5 and 50 as between 500 and 5000."""
    rng = random.Random(0)
    yield from [(1, 1), (5000, 37), (37, 5000), (1, 5000), (5000, 1), (28, 28), (336, 336), (337, 336), (5000, 5000)]
    for _ in range(991):
        yield round(5000 ** rng.random()), round(5000 ** rng.random())


def test_canvas_of_both_references() -> None:
    theirs = Llama4ImageProcessor(size={"height": 336, "width": 336}, max_patches=MAX_TILES)
    metas = VariableSizeImageTransform(336)
    resolutions = torch.tensor(metas.find_supported_resolutions(max_num_chunks=MAX_TILES, patch_size=336))
    for width, height in sizes():
        ours = best_canvas(height, width, 336, MAX_TILES)
        canvas_width, canvas_height = metas.get_best_fit((width, height), resolutions)
        assert ours == (canvas_height // 336, canvas_width // 336), (width, height)
        if width * height < MOST_PIXELS:
            image = torch.zeros(3, height, width, dtype=torch.uint8)
            assert theirs(image, return_tensors="pt")["aspect_ratios"].tolist() == [list(ours)], (width, height)


def test_tokens_of_both_references() -> None:
    genuine = Tokenizer(Path(meta.__file__).with_name("tokenizer.model"))
    processor = Llama4Processor.__new__(Llama4Processor)
    grids = {best_canvas(height, width) for width, height in sizes()}
    assert len(grids) > 40
    for rows, cols in grids:
        ours = image_tokens(rows, cols, 144, genuine)
        text = processor._prompt_split_image((rows, cols), 144)
        assert [genuine.special_tokens[name] for name in text.replace("><", "> <").split()] == ours
        tiles = torch.zeros(rows * cols + (rows * cols > 1), 3, 336, 336)
        assert chat_format()._encode_image(TransformedImage(tiles, (rows, cols))) == ours


def drawn(width: int, height: int, mode: str, seed: int) -> Image.Image:
    """Noise and a gradient, with transparency where the mode knows it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height, width, 4), generator=generator, dtype=torch.uint8)
    noise[..., 0] = torch.linspace(0, 255, width).to(torch.uint8)
    rgba = Image.fromarray(noise.numpy())
    if mode == "I;16":
        return Image.frombytes("I;16", (width, height), noise[..., :2].contiguous().numpy().tobytes())
    if mode == "P":
        palette = rgba.convert("RGB").quantize(32)
        palette.info["transparency"] = 3
        return palette
    return rgba.convert(mode)


def on_white(image: Image.Image) -> Image.Image:
    """By PIL alone: upright, transparency on white, RGB; 16 bits to the nearest of 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        return image.point(lambda value: value / 257 + 0.5).convert("L").convert("RGB")
    if image.mode in ("LA", "RGBA", "P"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def test_pixels_of_both_references() -> None:
    """Within 1/255: transformers' on every pixel (it normalises in bfloat16, half a level itself); Meta's, whose PIL
    rounds after each of its two passes with other weights, on all but one pixel in 10,000."""
    theirs = Llama4ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=MAX_TILES)
    metas, squash = VariableSizeImageTransform(TILE), ResizeNormalizeImageTransform(TILE, TILE)
    compared = beyond = pixels = 0
    for i, (width, height) in enumerate(sizes()):
        mode = MODES[i % len(MODES)]
        if width * height > MOST_PIXELS:
            continue
        exif = Image.Exif()
        exif[0x0112] = 1 + i // len(MODES) % 8
        file = io.BytesIO()
        drawn(width, height, mode, i).save(file, "TIFF" if mode == "CMYK" else "PNG", exif=exif)
        image = on_white(Image.open(file))
        ours = tile_image(load_image(file.getvalue()), TILE, MAX_TILES)
        level = (ours.pixel_values * 0.5 + 0.5) * 255

        tiles, (rows, cols) = metas(image, max_num_chunks=MAX_TILES)
        tiles = torch.cat([tiles, squash(image)[None]]) if len(tiles) > 1 else tiles
        assert (ours.rows, ours.cols) == (rows, cols)
        error = (level - (tiles * 0.5 + 0.5) * 255).abs().round()
        assert error.max() <= 2, (width, height, mode)
        beyond, pixels = beyond + int((error > 1).sum()), pixels + error.numel()

        other = theirs(image, return_tensors="pt")["pixel_values"].reshape(level.shape).float()
        assert (level - (other * 0.5 + 0.5) * 255).abs().max() <= 0.51, (width, height, mode)
        compared += 1
    assert compared > 600
    assert beyond < 1e-4 * pixels


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_what_they_say(mode: str) -> None:
    assert drawn(9, 5, mode, 0).mode == mode
