"""Scenes of coloured shapes and short texts: their description, and how they are drawn.

A `Scene` is plain data in pixels, so the same scene yields its picture at any scale (`draw`), a map of which pixel
belongs to which shape (`draw_labels`), and the true answers to questions (`questions.py`). Every shape is a polygon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from llama4.errors import Llama4Error

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

KINDS = ("circle", "square", "triangle", "star", "cross", "heart")

# The values that a colour's name may mean: the pure value first, then common variants (CSS, matplotlib, Material).
COLOURS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (214, 39, 40), (220, 20, 60), (229, 57, 53), (200, 0, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (44, 160, 44), (34, 139, 34), (76, 175, 80), (0, 200, 0)),
    "blue": ((0, 0, 255), (31, 119, 180), (30, 144, 255), (65, 105, 225), (0, 0, 205), (33, 150, 243)),
    "yellow": ((255, 255, 0), (255, 215, 0), (255, 235, 59), (240, 225, 20)),
    "orange": ((255, 165, 0), (255, 127, 14), (255, 140, 0), (251, 140, 0)),
    "purple": ((128, 0, 128), (148, 103, 189), (160, 32, 240), (153, 50, 204), (142, 36, 170)),
    "black": ((0, 0, 0), (20, 20, 20), (33, 33, 33)),
    "white": ((255, 255, 255), (245, 245, 245)),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One filled shape.

    `size` is the longer side of its upright box in pixels; `rotation` in degrees, clockwise; `aspect` is width over
    height of the box; `detail` is a cross's arm width, a star's inner radius, or a triangle's apex shift, each as a
    share of the size; `rim` an outline's colour. `rgb` defaults to the colour's pure value.
    """

    kind: str
    colour: str
    centre: tuple[float, float]
    size: float
    rotation: float = 0.0
    aspect: float = 1.0
    detail: float | None = None
    points: int = 5
    rgb: RGB | None = None
    rim: RGB | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Llama4Error(f"unknown kind of shape {self.kind!r}; use one of {', '.join(KINDS)}")
        if self.colour not in COLOURS:
            raise Llama4Error(f"unknown colour {self.colour!r}; use one of {', '.join(COLOURS)}")
        if not self.size > 0:
            raise Llama4Error(f"a shape's size must be positive, got {self.size}")

    @property
    def fill(self) -> RGB:
        """The colour that the shape is filled with."""
        return self.rgb or COLOURS[self.colour][0]


@dataclass(frozen=True, slots=True)
class Text:
    """A short line of capitals and digits. `height` is that of the ink in pixels, `slant` a shear (0.2 leans right)."""

    characters: str
    centre: tuple[float, float]
    height: float
    rgb: RGB = (0, 0, 0)
    font: str = "aileron"
    stretch: float = 1.0
    slant: float = 0.0
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Ground:
    """The background: one colour, or a linear gradient from `rgb` to `to` at `angle` degrees.

    `noise` is the standard deviation of normal noise from `seed`, in colour or `grey`, below the shapes or, as `grain`,
    over them too.
    """

    rgb: RGB = (255, 255, 255)
    to: RGB | None = None
    angle: float = 0.0
    noise: float = 0.0
    grey: bool = False
    grain: bool = False
    seed: int = 0

    def colours(self) -> list[RGB]:
        """Sample colours along the gradient (or the one plain colour)."""
        if self.to is None:
            return [self.rgb]
        mixes = (0.0, 0.25, 0.5, 0.75, 1.0)
        return [mix(self.rgb, self.to, t) for t in mixes]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's contents; `width`, `height` and every position in pixels, y downwards."""

    width: int
    height: int
    ground: Ground = Ground()
    shapes: tuple[Shape, ...] = ()
    text: Text | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise Llama4Error(f"a scene must be at least 1x1 pixels, got {self.width}x{self.height}")


# ---------------------------------------------------------------------------------------------------- geometry


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """The colour at a share t of the way from a to b."""
    red, green, blue = (round(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return red, green, blue


@lru_cache(maxsize=4096)
def _unit_outline(kind: str, detail: float | None, points: int) -> NDArray[np.float64]:
    """Corners [n, 2] of a shape around its box's centre; the longer side of the box is 1."""
    if kind == "square":
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float64)
    elif kind == "triangle":
        corners = np.array([(2 * (detail or 0.0), -1), (1, 1), (-1, 1)], np.float64)
    elif kind == "cross":
        a = detail or 0.33
        corners = np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    else:
        n = {"star": 2 * points, "circle": 72, "heart": 60}[kind]
        t = np.arange(n) * (2 * math.pi / n)
        x, y = np.sin(t), -np.cos(t)
        if kind == "star":
            radius = np.where(np.arange(n) % 2 == 0, 1.0, 2 * (detail or 0.21))
            x, y = x * radius, y * radius
        elif kind == "heart":
            x = 16 * np.sin(t) ** 3
            y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        corners = np.stack([x, y], axis=1)
    low, high = corners.min(axis=0), corners.max(axis=0)
    unit: NDArray[np.float64] = (corners - (low + high) / 2) / (high - low).max()
    unit.setflags(write=False)
    return unit


def outline(shape: Shape) -> NDArray[np.float64]:
    """Corners [n, 2] (x, y) of the shape's polygon in pixels of the scene."""
    corners = _unit_outline(shape.kind, shape.detail, shape.points)
    squeeze = np.array([min(1.0, shape.aspect), min(1.0, 1.0 / shape.aspect)]) * shape.size
    angle = math.radians(shape.rotation)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    rotated: NDArray[np.float64] = (corners * squeeze) @ rotation + np.array(shape.centre)
    return rotated


def shape_box(shape: Shape) -> Box:
    """The axis-parallel bounding box of the shape, rotation included."""
    corners = outline(shape)
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def text_box(text: Text) -> Box:
    """The bounding box of the text's ink."""
    width = text.height * text_aspect(text)
    x, y = text.centre
    return x - width / 2, y - text.height / 2, x + width / 2, y + text.height / 2


# ------------------------------------------------------------------------------------------------------ drawing


def draw(scene: Scene, scale: float = 1.0) -> Image.Image:
    """The scene as an RGB picture of round(scale * width) x round(scale * height) pixels (at least 1 x 1)."""
    width, height = max(1, round(scene.width * scale)), max(1, round(scene.height * scale))
    picture = _draw_ground(scene.ground, width, height)
    for shape in scene.shapes:
        _fill(picture, outline(shape) * scale, shape.fill)
        if shape.rim is not None:
            _stroke(picture, outline(shape) * scale, shape.rim, max(1.0, 0.05 * shape.size * scale))
    if scene.text is not None:
        _draw_text(picture, scene.text, scale)
    if scene.ground.noise and scene.ground.grain:
        pixels = np.asarray(picture, np.float32)
        picture = _to_image(pixels + _noise(scene.ground, width, height))
    return picture


def draw_labels(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """Which shape covers each pixel of the scene resized to width x height.

    Returns [height, width]: 0 for the ground (and text), i + 1 for `scene.shapes[i]`.
    """
    labels = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(labels)
    scale = np.array([width / scene.width, height / scene.height])
    for i, shape in enumerate(scene.shapes):
        pen.polygon(_points(outline(shape) * scale - 0.5), fill=i + 1)
    return np.array(labels)


def _points(corners: NDArray[np.float64]) -> list[float]:
    flat: list[float] = corners.ravel().tolist()
    return flat


def _fill(picture: Image.Image, corners: NDArray[np.float64], rgb: RGB) -> None:
    """Fill a polygon with corners [n, 2], antialiased."""
    mask, pen, finer, origin = _fine_mask(corners, 0.0)
    pen.polygon(_points((corners - origin) * finer - 0.5), fill=255)
    picture.paste(rgb, origin, mask.reduce(finer))


def _stroke(picture: Image.Image, corners: NDArray[np.float64], rgb: RGB, width: float) -> None:
    """Draw a closed line of `width` pixels through corners [n, 2], antialiased."""
    mask, pen, finer, origin = _fine_mask(corners, width)
    closed = np.concatenate([corners, corners[:2]])
    pen.line(_points((closed - origin) * finer - 0.5), fill=255, width=round(width * finer), joint="curve")
    picture.paste(rgb, origin, mask.reduce(finer))


def _fine_mask(
    corners: NDArray[np.float64], border: float
) -> tuple[Image.Image, ImageDraw.ImageDraw, int, tuple[int, int]]:
    """An empty mask of the polygon's own box, `finer` times larger than the picture, and the box's origin there."""
    left, top = (math.floor(v) for v in corners.min(axis=0) - border)
    right, bottom = (math.ceil(v) for v in corners.max(axis=0) + border)
    finer = 4 if max(right - left, bottom - top) < 160 else 2
    mask = Image.new("L", (max(1, right - left) * finer, max(1, bottom - top) * finer), 0)
    return mask, ImageDraw.Draw(mask), finer, (left, top)


def _draw_ground(ground: Ground, width: int, height: int) -> Image.Image:
    noise_below = ground.noise > 0 and not ground.grain
    if ground.to is None and not noise_below:
        return Image.new("RGB", (width, height), ground.rgb)
    pixels = np.full((height, width, 3), ground.rgb, np.float32)
    if ground.to is not None:
        angle = math.radians(ground.angle)
        across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * math.cos(angle)
        down = np.linspace(-0.5, 0.5, height, dtype=np.float32) * math.sin(angle)
        reach = abs(math.cos(angle)) + abs(math.sin(angle))
        t = (across[None, :] + down[:, None]) / reach + 0.5
        pixels += t[:, :, None] * (np.array(ground.to, np.float32) - np.array(ground.rgb, np.float32))
    if noise_below:
        pixels += _noise(ground, width, height)
    return _to_image(pixels)


def _noise(ground: Ground, width: int, height: int) -> NDArray[np.float32]:
    channels = 1 if ground.grey else 3
    normal = np.random.default_rng(ground.seed).standard_normal((height, width, channels), np.float32)
    return normal * np.float32(ground.noise)


def _to_image(pixels: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------------- text


FONTS = ("aileron", "courier")
"""The two fonts that Pillow contains: scenes must not depend on what else is installed."""


@lru_cache(maxsize=32)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name not in FONTS:
        raise Llama4Error(f"unknown font {name!r}; use one of {', '.join(FONTS)}")
    if name == "courier":  # a bitmap font of one size
        return ImageFont.load_default_imagefont()
    return ImageFont.load_default(size)


@lru_cache(maxsize=256)
def _ink(characters: str, font_name: str, slant: float, bold: bool, size: int) -> Image.Image:
    """The text's coverage ("L"), cut to the ink, with letters about 0.7 `size` high."""
    font = _font(font_name, size)
    if isinstance(font, ImageFont.FreeTypeFont):
        stroke = round(size * 0.035) if bold else 0
        left, top, right, bottom = font.getbbox(characters, stroke_width=stroke)
        ink = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2), 0)
        ImageDraw.Draw(ink).text((1 - left, 1 - top), characters, fill=255, font=font, stroke_width=stroke)
    else:
        left, top, right, bottom = font.getbbox(characters)
        ink = Image.new("L", (int(right - left), int(bottom - top)), 0)
        ImageDraw.Draw(ink).text((-left, -top), characters, fill=255, font=font)
        ink = ink.crop(ink.getbbox())
        larger = max(1.0, size * 0.7 / ink.height)
        ink = ink.resize((round(ink.width * larger), round(ink.height * larger)), Image.Resampling.BICUBIC)
    if slant:
        lean = abs(slant) * ink.height
        shift = 0.0 if slant < 0 else -lean
        ink = ink.transform(
            (ink.width + math.ceil(lean), ink.height),
            Image.Transform.AFFINE,
            (1, slant, shift, 0, 1, 0),
            Image.Resampling.BILINEAR,
        )
    return ink.crop(ink.getbbox())


def text_aspect(text: Text) -> float:
    """Width over height of the text's ink."""
    ink = _ink(text.characters, text.font, text.slant, text.bold, 64)
    return ink.width / ink.height * text.stretch


def _draw_text(picture: Image.Image, text: Text, scale: float) -> None:
    height = text.height * scale
    ink = _ink(text.characters, text.font, text.slant, text.bold, 64 if height < 45 else 256)
    size = max(1, round(height * text_aspect(text))), max(1, round(height))
    mask = ink.resize(size, Image.Resampling.BOX if height < ink.height else Image.Resampling.BICUBIC)
    x, y = text.centre
    picture.paste(text.rgb, (round(x * scale - size[0] / 2), round(y * scale - size[1] / 2)), mask)
