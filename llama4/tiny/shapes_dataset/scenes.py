"""Random scenes, in which nothing overlaps, is cut off, or is too pale or too small to see."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from llama4.errors import Llama4Error
from llama4.tiny.shapes_dataset.pictures import (
    COLOURS,
    FONTS,
    KINDS,
    RGB,
    Box,
    Ground,
    Scene,
    Shape,
    Text,
    mix,
    shape_box,
    text_aspect,
    text_box,
)

_JITTER = 8  # per channel; keeps gold yellow and (255, 165, 0) orange
_CONTRAST = 110.0  # least distance in RGB between a shape and any point of the ground
_TEXT_CONTRAST = 110.0  # least difference in luminance between a text and the ground
_LEAST_SEEN = 16.0  # least size, in the pixels the model sees, of a shape or a text's height


def random_scene(
    rng: random.Random,
    *,
    num_shapes: int | None = None,
    sides: tuple[int, int] = (60, 1200),
    with_text: bool = False,
    most_shapes: int = 6,
) -> Scene:
    """A random scene, with sides of `sides` pixels (least, most) and aspect ratios up to 20:1.

    `num_shapes` is by default 1 to `most_shapes`, or 0 to 2 beside a text. Shapes and text contrast with the background
    and are large enough for the embedded model to see.

    Raises:
        Llama4Error: sides that are not in ascending order, or more than 12 shapes.
    """
    if not 0 < sides[0] <= sides[1]:
        raise Llama4Error(f"sides must be two pixel counts in ascending order, got {sides}")
    if num_shapes is not None and not 0 <= num_shapes <= 12:
        raise Llama4Error(f"num_shapes must be between 0 and 12, got {num_shapes}")
    if num_shapes is None:
        num_shapes = rng.choice((0, 0, 0, 1, 2)) if with_text else rng.randint(1, most_shapes)
    width, height = _random_size(rng, *sides)
    ground, palette, inks = _random_ground(rng)
    text = _random_text(rng, width, height, inks, alone=num_shapes == 0) if with_text else None
    kinds = _with_repeats(rng, KINDS, num_shapes)
    colours = _with_repeats(rng, tuple(palette), num_shapes)
    sizes = _random_sizes(rng, width, height, num_shapes)
    shapes = [_random_shape(rng, k, c, palette[c], s) for k, c, s in zip(kinds, colours, sizes, strict=True)]
    return Scene(width, height, ground, *_place(rng, width, height, shapes, text))


def _random_size(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    """Log-uniform sides; three of four pictures have an aspect ratio below 2:1."""
    longest = rng.choices((2.0, 5.0, 20.0), (15, 4, 1))[0]
    a = math.exp(rng.uniform(math.log(low), math.log(high)))
    ratio = math.exp(rng.uniform(0, math.log(longest)))
    if rng.random() < 0.12:
        ratio = 1.0
    b = min(high, max(low, a * ratio if rng.random() < 0.5 else a / ratio))
    return round(a), round(b)


def _luminance(rgb: RGB) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def _jittered(rng: random.Random, rgb: RGB) -> RGB:
    red, green, blue = (min(255, max(0, v + rng.randint(-_JITTER, _JITTER))) for v in rgb)
    return red, green, blue


def _random_ground_rgb(rng: random.Random) -> RGB:
    style = rng.choices(("white", "light", "dark", "black", "grey", "coloured"), (45, 24, 11, 7, 8, 5))[0]
    if style == "white":
        return (255, 255, 255)
    if style == "black":
        return (0, 0, 0)
    if style == "grey":
        level = rng.randint(90, 235)
        return (level, level, level)
    if style == "coloured":
        return _jittered(rng, rng.choice(COLOURS[rng.choice(tuple(COLOURS))]))
    low, high = (190, 255) if style == "light" else (0, 65)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _random_ground(rng: random.Random) -> tuple[Ground, dict[str, list[RGB]], list[RGB]]:
    """A background, and the colours that contrast with it: of shapes (name -> variants) and of text."""
    while True:
        style = rng.choices(("plain", "noisy", "gradient"), (50, 25, 25))[0]
        rgb = _random_ground_rgb(rng)
        to = mix(rgb, _random_ground_rgb(rng), rng.uniform(0.3, 1.0)) if style == "gradient" else None
        noise = 0.0
        if style == "noisy" or (style == "gradient" and rng.random() < 0.2):
            noise = math.exp(rng.uniform(math.log(3), math.log(40)))
        ground = Ground(
            rgb, to, rng.uniform(0, 360), noise, rng.random() < 0.4, rng.random() < 0.3, rng.getrandbits(32)
        )
        below = ground.colours()
        palette = {
            name: kept
            for name, variants in COLOURS.items()
            if (kept := [v for v in variants if min(math.dist(v, g) for g in below) >= _CONTRAST + noise])
        }
        candidates = [v for variants in COLOURS.values() for v in variants] + [(0, 0, 0), (255, 255, 255)] * 12
        inks = [
            v for v in candidates if min(abs(_luminance(v) - _luminance(g)) for g in below) >= _TEXT_CONTRAST + noise
        ]
        if len(palette) >= 4 and inks:
            return ground, palette, inks


def _with_repeats(rng: random.Random, names: tuple[str, ...], n: int) -> list[str]:
    """n names: independent, or all different, or one of them frequent, so that there is something to count."""
    if rng.random() < 0.45:
        return [rng.choice(names) for _ in range(n)]
    if rng.random() < 0.4:
        return rng.sample(names, n) if n <= len(names) else [rng.choice(names) for _ in range(n)]
    main, share = rng.choice(names), rng.choice((0.5, 0.8, 1.0))
    return [main if rng.random() < share else rng.choice(names) for _ in range(n)]


def _least_size(width: int, height: int) -> float:
    return max(10.0, 0.14 * min(width, height), _LEAST_SEEN / seen_scale(width, height))


def _random_sizes(rng: random.Random, width: int, height: int, n: int) -> list[float]:
    """Sizes of the shapes of one picture; the largest is at most 2.5 times the smallest."""
    short = min(width, height)
    low = min(_least_size(width, height), 0.8 * short)
    high = max(low, min(0.8 * short, math.sqrt(0.4 * width * height / max(1, n))))
    middle = math.exp(rng.uniform(math.log(low), math.log(high)))
    return [min(high, max(low, middle * math.exp(rng.uniform(-0.45, 0.45)))) for _ in range(n)]


def _random_shape(rng: random.Random, kind: str, colour: str, variants: list[RGB], size: float) -> Shape:
    rgb = _jittered(rng, rng.choice(variants)) if rng.random() < 0.7 else variants[0]
    rotation, aspect, detail, points = 0.0, 1.0, None, 5
    turned = rng.random() < 0.5
    if kind == "circle":
        aspect = rng.uniform(0.9, 1.1) if rng.random() < 0.3 else 1.0
    elif kind == "square":
        rotation = rng.uniform(-10, 10) if turned else 0.0
        aspect = rng.uniform(0.92, 1.08) if rng.random() < 0.3 else 1.0
    elif kind == "triangle":
        rotation = rng.choice((90, 180, 270)) if rng.random() < 0.15 else 0.0
        rotation += rng.uniform(-12, 12) if turned else 0.0
        aspect = rng.uniform(0.85, 1.25)
        detail = rng.uniform(-0.2, 0.2) if rng.random() < 0.4 else 0.0
    elif kind == "star":
        rotation = rng.uniform(-36, 36) if turned else 0.0
        points = rng.choices((5, 6, 4), (85, 10, 5))[0]
        detail = rng.uniform(0.18, 0.24)
    elif kind == "cross":
        rotation = rng.uniform(-12, 12) if turned else 0.0
        detail = rng.uniform(0.2, 0.42)
    else:
        rotation = rng.uniform(-15, 15) if turned else 0.0
        aspect = rng.uniform(0.92, 1.1)
    rim = None
    if rng.random() < 0.12:
        rim = (0, 0, 0) if rng.random() < 0.5 else mix(rgb, (0, 0, 0), 0.45)
    if detail is not None:
        detail = round(detail, 2)
    return Shape(kind, colour, (0.0, 0.0), size, rotation, aspect, detail, points, rgb, rim)


def _random_text(rng: random.Random, width: int, height: int, inks: list[RGB], *, alone: bool) -> Text:
    """1 to 6 characters, as many as are legible at this width."""
    letters, digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
    alphabet = rng.choices((letters, digits, letters + digits), (5, 3, 4))[0]
    wanted = rng.randint(1, 6)
    if wanted == 1 or alphabet == letters + digits:  # O and 0, or I and 1, cannot be told apart
        alphabet = "".join(c for c in alphabet if c not in "OI01")
    characters = "".join(rng.choice(alphabet) for _ in range(wanted))
    style = Text(
        characters,
        (width / 2, height / 2),
        1.0,
        rng.choice(inks),
        rng.choice(FONTS),
        round(rng.uniform(0.85, 1.2), 2),
        rng.choice((0.0, 0.0, 0.0, 0.2, -0.1)),
        rng.random() < 0.35,
    )
    low = max(8.0, _LEAST_SEEN / seen_scale(width, height))
    room = (0.92 * width, (0.8 if alone else 0.45) * height)
    if style.font == "courier":  # a small bitmap, which blurs when enlarged
        room = (room[0], min(room[1], 24.0 / seen_scale(width, height)))
    high = min(room[1], room[0] / text_aspect(style))
    while high < low and len(style.characters) > 1:
        style = replace(style, characters=style.characters[:-1])
        high = min(room[1], room[0] / text_aspect(style))
    tall = math.exp(rng.uniform(math.log(min(low, high)), math.log(high)))
    return replace(style, height=tall)


def _place(
    rng: random.Random, width: int, height: int, shapes: list[Shape], text: Text | None
) -> tuple[tuple[Shape, ...], Text | None]:
    """Place everything without overlap; whenever that fails, make everything a little smaller and try again."""
    gap = max(2.0, 3.0 / seen_scale(width, height))
    while True:
        taken: list[Box] = []
        if text is not None:
            spot = _free_spot(rng, width, height, text_box(replace(text, centre=(0.0, 0.0))), taken, gap)
            if spot is not None:
                text = replace(text, centre=spot[0])
                taken.append(spot[1])
        placed: dict[int, Shape] = {}
        for i in sorted(range(len(shapes)), key=lambda i: -shapes[i].size):
            spot = _free_spot(rng, width, height, shape_box(shapes[i]), taken, gap)
            if spot is None:
                break
            placed[i] = replace(shapes[i], centre=spot[0])
            taken.append(spot[1])
        if len(taken) == len(shapes) + (text is not None):
            return tuple(placed[i] for i in range(len(shapes))), text
        shapes = [replace(s, size=s.size * 0.93) for s in shapes]
        if text is not None:
            text = replace(text, height=text.height * 0.97)
        gap *= 0.98


def _free_spot(
    rng: random.Random, width: int, height: int, box: Box, taken: list[Box], gap: float
) -> tuple[tuple[float, float], Box] | None:
    """A free position for a thing with this `box` around its centre, and the box there; None after 25 failed tries."""
    left, top, right, bottom = box
    edge = 1.0
    if right - left > width - 2 * edge or bottom - top > height - 2 * edge:
        return None
    for _ in range(25):
        x = rng.uniform(edge - left, width - edge - right)
        y = rng.uniform(edge - top, height - edge - bottom)
        here = (x + left, y + top, x + right, y + bottom)
        if all(
            here[0] - gap > b[2] or here[2] + gap < b[0] or here[1] - gap > b[3] or here[3] + gap < b[1] for b in taken
        ):
            return (x, y), here
    return None


def seen_scale(width: int, height: int, tile: int = 112, max_tiles: int = 4) -> float:
    """The factor by which the embedded model's image preparation resizes such a picture (see vision/tiling.py)."""
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles // i + 1)]
    fit = max(min(i * tile / width, j * tile / height) for i, j in grids)
    return min(fit, max(1.0, tile / max(width, height)))
