"""Canvas, resizing, padding and tiles against Meta's image preparation and transformers' `Llama4ImageProcessor`."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers import Llama4ImageProcessor

truncated = ImageFile.LOAD_TRUNCATED_IMAGES
from llama_models.llama4.preprocess import (  # noqa: E402
    ResizeNormalizeImageTransform,
    VariableSizeImageTransform,
)

ImageFile.LOAD_TRUNCATED_IMAGES = truncated  # Meta's module switches it on for the whole process

from llama4.vision.tiling import best_canvas, tile_image, tokens_per_tile  # noqa: E402
from tests.drawn import drawn  # noqa: E402

SIZES = [
    (336, 336),
    (1, 1),
    (100, 50),
    (337, 336),
    (300, 700),
    (640, 480),
    (1920, 1080),
    (500, 501),
    (3, 1000),
    (4000, 30),
    (2500, 2400),
]


def picture(width: int, height: int) -> Image.Image:
    """Noise, blurred to blocks of about 8 pixels over one half, so that there are edges of every kind."""
    generator = torch.Generator().manual_seed(width * 10_007 + height)
    noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    small = image.resize((max(width // 8, 1), max(height // 8, 1))).resize((width, height), Image.Resampling.BICUBIC)
    image.paste(small.crop((0, 0, width // 2, height)), (0, 0))
    return image


def meta_tiles(image: Image.Image, tile: int, max_tiles: int) -> tuple[torch.Tensor, tuple[int, int]]:
    tiles, (rows, cols) = VariableSizeImageTransform(tile)(image, max_num_chunks=max_tiles)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, ResizeNormalizeImageTransform(tile, tile)(image)[None]])
    return tiles, (rows, cols)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("tile", "max_tiles"), [(336, 16), (112, 4)])
def test_pixels_are_the_references(size: tuple[int, int], tile: int, max_tiles: int) -> None:
    image = picture(*size)
    ours = tile_image(image, tile, max_tiles)
    assert ours.pixel_values.dtype == torch.float32
    levels = (ours.pixel_values * 0.5 + 0.5) * 255

    metas, grid = meta_tiles(image, tile, max_tiles)
    assert (ours.rows, ours.cols) == grid
    assert metas.shape == ours.pixel_values.shape
    error = (levels - (metas * 0.5 + 0.5) * 255).abs().round()
    # PIL rounds after each of its two passes, with other weights than torch: one level of 255 apart, very rarely two.
    assert error.max() <= 2
    assert (error > 1).float().mean() < 1e-4

    processor = Llama4ImageProcessor(size={"height": tile, "width": tile}, max_patches=max_tiles)
    theirs = processor(image, return_tensors="pt")
    assert theirs["aspect_ratios"].tolist() == [[ours.rows, ours.cols]]
    pixel_values = theirs["pixel_values"].reshape(ours.pixel_values.shape).float()
    # The same resize; only that transformers normalises in bfloat16, half a level off at most.
    assert (levels - (pixel_values * 0.5 + 0.5) * 255).abs().max() <= 0.51


@drawn(300)
@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([1, 4, 5, 16]))
def test_canvas_is_metas(height: int, width: int, max_tiles: int) -> None:
    meta = VariableSizeImageTransform(336)
    resolutions = torch.tensor(meta.find_supported_resolutions(max_num_chunks=max_tiles, patch_size=336))
    canvas_width, canvas_height = meta.get_best_fit((width, height), resolutions)
    assert best_canvas(height, width, 336, max_tiles) == (canvas_height // 336, canvas_width // 336)


@drawn(300)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_canvas_follows_the_rule_in_exact_arithmetic(height: int, width: int) -> None:
    grids = [(r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= 16]
    scale = {(r, c): min(Fraction(336 * r, height), Fraction(336 * c, width)) for r, c in grids}
    enlarging = [s for s in scale.values() if s >= 1]
    best = min(enlarging) if enlarging else max(scale.values())
    expected = min((r * c, (r, c)) for (r, c), s in scale.items() if s == best)[1]
    assert best_canvas(height, width) == expected


def test_tiles_are_in_reading_order_and_the_global_one_is_last() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    image = Image.new("RGB", (3 * 336, 2 * 336))
    for i, colour in enumerate(colours):
        image.paste(colour, ((i % 3) * 336, (i // 3) * 336, (i % 3 + 1) * 336, (i // 3 + 1) * 336))
    tiles = tile_image(image)
    assert (tiles.rows, tiles.cols) == (2, 3)
    assert tiles.pixel_values.shape == (7, 3, 336, 336)
    for tile, colour in zip(tiles.pixel_values, colours, strict=False):
        expected = torch.tensor(colour).view(3, 1, 1) / 255 * 2 - 1
        torch.testing.assert_close(tile, expected.expand_as(tile))
    centre = tiles.pixel_values[-1, :, 84, 168]
    torch.testing.assert_close(centre, torch.tensor([-1.0, 1.0, -1.0]))


def test_padding_is_black_right_and_below() -> None:
    tiles = tile_image(Image.new("RGB", (336, 100), (255, 255, 255)))
    assert (tiles.pixel_values[0, :, :100] == 1).all()
    assert (tiles.pixel_values[0, :, 100:] == -1).all()


def test_enlarging_stops_at_one_tile() -> None:
    tiles = tile_image(Image.new("RGB", (10, 20), (255, 255, 255)))
    white = (tiles.pixel_values[0, 0] == 1).nonzero().amax(0) + 1
    assert (tiles.rows, tiles.cols) == (1, 1)
    assert white.tolist() == [336, 168]


def test_mean_and_std_per_channel() -> None:
    tiles = tile_image(Image.new("RGB", (8, 8), (51, 102, 204)), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.1))
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (0.8 - 0.3) / 0.1])
    torch.testing.assert_close(tiles.pixel_values[0, :, 5, 5], expected)


def test_twelve_megapixels_are_fast() -> None:
    image = Image.effect_noise((4000, 3000), 80).convert("RGB")
    start = time.process_time()
    tiles = tile_image(image)
    assert time.process_time() - start < 20  # 0.08 s on an idle core
    assert len(tiles.pixel_values) == 13


@pytest.mark.parametrize(
    ("tile", "patch", "ratio", "expected"), [(336, 14, 0.5, 144), (112, 14, 0.5, 16), (56, 14, 1, 16)]
)
def test_tokens_per_tile(tile: int, patch: int, ratio: float, expected: int) -> None:
    assert tokens_per_tile(tile, patch, ratio) == expected


def test_sizes_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"tile side 100 .* patch side 14"):
        tokens_per_tile(100, 14)
    with pytest.raises(ValueError, match=r"3 patches a side .* 1\.5"):
        tokens_per_tile(42, 14, 0.5)
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        best_canvas(5, 0)
    with pytest.raises(ValueError, match="max_tiles 0"):
        best_canvas(5, 5, max_tiles=0)
    with pytest.raises(ValueError, match="this one is L"):
        tile_image(Image.new("L", (5, 5)))
