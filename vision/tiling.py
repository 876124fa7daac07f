"""An image of any size -> square tiles that the vision encoder reads.

The rules are those of Meta's Llama 4 image preparation, which Hugging Face's `Llama4ImageProcessor` reproduces. Both
resize in 8 bits, bilinear with antialiasing. So does this module, with the kernel of the latter (torch's); that of the
former (PIL's) rounds some pixels to the neighbouring level.

Shapes: n tiles, A side of a tile in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.vision.images import BAND_PIXELS

MAX_WIDENED_PIXELS = 2**24
"""Of an image whose rows are resized and whose columns are not yet, if that is more than the image has."""


@dataclass(frozen=True)
class Tiles:
    """One prepared image: its grid of tiles row by row and, if the grid has more than one, the global tile last."""

    pixel_values: Tensor
    """[n, 3, A, A] float32, normalised; n = rows * cols, plus 1 where rows * cols > 1."""
    rows: int
    cols: int


def tokens_per_tile(tile: int, patch: int, pixel_shuffle_ratio: float = 0.5) -> int:
    """How many `<|patch|>` tokens one tile becomes: (tile / patch)^2 * pixel_shuffle_ratio^2.

    Raises:
        Llama4Error: the tile does not divide into patches, or the patches do not divide by the pixel shuffle.
    """
    if patch < 1 or tile < patch or tile % patch:
        raise Llama4Error(f"tile side {tile} is not a multiple of the patch side {patch}; choose one that is")
    side = tile // patch * pixel_shuffle_ratio
    if side != int(side) or side < 1:
        raise Llama4Error(
            f"{tile // patch} patches a side times the pixel shuffle ratio {pixel_shuffle_ratio} is {side:g}, "
            "not a whole number; choose a tile side that makes it one"
        )
    return int(side) ** 2


def best_canvas(
    height: int,
    width: int,
    tile: int = 336,
    max_tiles: int = 16,
    largest: bool = False,
    precision: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """The grid (rows, cols) of at most `max_tiles` tiles that an image of `height` x `width` pixels is resized into.

    With scale = min(rows * tile / height, cols * tile / width): the smallest scale >= 1 if there is one, else, or if
    `largest`, the largest of all; among equal scales the fewest tiles. Scales are compared in float32, as Llama 4's
    references do: in large images two fractions that differ by less than its precision are equal. Llama 3.2's compare
    in float64.

    Raises:
        Llama4Error: an image without pixels, or a size below 1.
    """
    if height < 1 or width < 1:
        raise Llama4Error(f"an image of {width} x {height} pixels has no canvas; both sides must be at least 1")
    if tile < 1 or max_tiles < 1:
        raise Llama4Error(f"tile side {tile} and max_tiles {max_tiles} must both be at least 1")
    grids = torch.tensor([(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)])
    sides = (grids * tile).to(precision)
    scales = torch.minimum(sides[:, 0] / height, sides[:, 1] / width)
    enlarging = scales[scales >= 1]
    chosen = enlarging.min() if enlarging.numel() and not largest else scales.max()
    candidates: list[list[int]] = grids[scales == chosen].tolist()
    rows, cols = min(candidates, key=lambda grid: grid[0] * grid[1])
    return rows, cols


def fit_within(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """The largest (height, width) of the same aspect ratio inside the given box, each side at least 1 pixel."""
    by_width, by_height = max_width / width, max_height / height
    if by_width < by_height:
        return max(min(int(height * by_width), max_height), 1), max_width
    return max_height, max(min(int(width * by_height), max_width), 1)


def tile_image(
    image: Image.Image,
    tile: int = 336,
    max_tiles: int = 16,
    mean: float | tuple[float, float, float] = 0.5,
    std: float | tuple[float, float, float] = 0.5,
    *,
    resize_to_max_canvas: bool = False,
    resample: str = "bilinear",
    rescale_factor: float = 1 / 255,
    global_tile: bool = True,
    precision: torch.dtype = torch.float32,
) -> Tiles:
    """Resize with the aspect ratio kept, pad right and below with black, normalise, and cut into tiles.

    An image is enlarged at most until its longer side is a tile's, unless `resize_to_max_canvas`. If there is more than
    one tile, and `global_tile`, a global tile comes last: the whole image resized to one tile, its aspect ratio not
    kept.

    Args:
        image: an RGB image (see `load_image`).
        tile: side of a tile in pixels, A.
        max_tiles: most tiles in the grid, not counting the global tile.
        mean, std: of the normalisation (x * rescale_factor - mean) / std, for all channels or one each.
        resize_to_max_canvas: enlarge as far as `max_tiles` allow. Sizes are exact, as in Meta's code; transformers
            rounds to float32 there, and has one pixel less in some.
        precision: in which grids are compared, see `best_canvas`.
        resample: filter of both resizes: bilinear, bicubic and lanczos with antialiasing, or nearest-exact.

    Raises:
        Llama4Error: the image is not RGB or has no pixels, or an argument is out of range.
    """
    if image.mode != "RGB":
        raise Llama4Error(f"tile_image needs an RGB image, this one is {image.mode}; pass it through load_image first")
    width, height = image.size
    rows, cols = best_canvas(height, width, tile, max_tiles, resize_to_max_canvas, precision)
    canvas_height, canvas_width = rows * tile, cols * tile
    pixels = _pixels(image)

    box = canvas_height, canvas_width
    if not resize_to_max_canvas:
        box = min(max(height, tile), canvas_height), min(max(width, tile), canvas_width)
    canvas = pixels.new_zeros(3, canvas_height, canvas_width)
    resized = _resize(pixels, *fit_within(height, width, *box), resample)
    canvas[:, : resized.shape[1], : resized.shape[2]] = resized

    tiles = canvas.view(3, rows, tile, cols, tile).permute(1, 3, 0, 2, 4).reshape(rows * cols, 3, tile, tile)
    if rows * cols > 1 and global_tile:
        tiles = torch.cat([tiles, _resize(pixels, tile, tile, resample).unsqueeze(0)])
    return Tiles(_normalise(tiles, rescale_factor, mean, std), rows, cols)


def _pixels(image: Image.Image) -> Tensor:
    """[1, 3, h, w] uint8. Memory order is height, width, channel, for which the resize has its fastest kernel. An image
    is copied in bands of rows, as PIL makes two copies of what it gives."""
    pixels_HWC = torch.empty(image.height, image.width, 3, dtype=torch.uint8)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows)))
        data = torch.frombuffer(bytearray(band.tobytes()), dtype=torch.uint8)
        pixels_HWC[top : top + rows] = data.view(band.height, band.width, 3)
    return pixels_HWC.permute(2, 0, 1).unsqueeze(0)


def _resize(pixels: Tensor, height: int, width: int, resample: str) -> Tensor:
    """[1, 3, h, w] uint8 -> [3, height, width] uint8.

    torch resizes rows first, as PIL does, in between rounding to 8 bits. Of a very tall and narrow picture, whose
    widened rows would fill the memory, columns go first; that rounds some pixels to the neighbouring level.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels[0]
    if resample == "nearest-exact":
        return F.interpolate(pixels, (height, width), mode=resample)[0]
    interpolate = partial(F.interpolate, mode=resample, align_corners=False, antialias=True)
    if pixels.shape[-2] * width > max(MAX_WIDENED_PIXELS, pixels.shape[-2] * pixels.shape[-1]):
        pixels = interpolate(pixels, (height, pixels.shape[-1]))
    return interpolate(pixels, (height, width))[0]


def _normalise(
    tiles: Tensor, scale: float, mean: float | tuple[float, float, float], std: float | tuple[float, float, float]
) -> Tensor:
    mean_C11 = torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
    std_C11 = torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
    return tiles.to(torch.float32).div_(1 / scale).sub_(mean_C11).div_(std_C11)
