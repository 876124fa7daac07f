"""Drawings against what can be measured in their pixels alone."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from PIL import Image

from llama4.tiny.shapes_dataset import COLOURS, KINDS, Ground, Scene, Shape, Text, draw, draw_labels, random_scene
from llama4.tiny.shapes_dataset.scenes import seen_scale

SEEDS = range(150)


def nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: min(math.dist(rgb, v) for v in COLOURS[name]))


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Connected pieces (4 neighbours) of a boolean mask, by flood fill, as arrays [n, 2] of (y, x)."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        edge = [left.pop()]
        piece = list(edge)
        while edge:
            y, x = edge.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
                    piece.append(near)
        found.append(np.array(piece))
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_every_shape_is_there_whole_apart_and_of_its_colour(seed: int) -> None:
    scene = random_scene(random.Random(seed), sides=(60, 300))
    picture = np.asarray(draw(scene), np.float64)
    labels = draw_labels(scene, scene.width, scene.height)
    assert picture.shape == (scene.height, scene.width, 3)
    assert set(np.unique(labels)) == set(range(len(scene.shapes) + 1))
    found = [p for p in pieces(labels > 0) if len(p) > 3]  # a star's tip may lose touch with it
    assert len(found) == len(scene.shapes)
    for i, shape in enumerate(scene.shapes):
        ys, xs = np.nonzero(labels == i + 1)
        x, y = shape.centre
        assert abs((xs.min() + xs.max() + 1) / 2 - x) <= 0.12 * shape.size + 1.5
        assert abs((ys.min() + ys.max() + 1) / 2 - y) <= 0.12 * shape.size + 1.5
        inside = picture[labels == i + 1]
        assert nearest_colour(np.median(inside, axis=0)) == shape.colour


def test_a_red_circle_on_white_is_what_any_tool_would_draw() -> None:
    scene = Scene(100, 80, Ground(), (Shape("circle", "red", (40.0, 30.0), 40.0),))
    ys, xs = np.mgrid[0:80, 0:100] + 0.5
    inside = np.hypot(xs - 40, ys - 30) <= 20
    exact = np.where(inside[..., None], (255, 0, 0), (255, 255, 255)).astype(float)
    off = np.abs(np.asarray(draw(scene), float) - exact).max(axis=2)
    rim = np.abs(np.hypot(xs - 40, ys - 30) - 20) < 1.2
    assert off[~rim].max() == 0
    assert (draw_labels(scene, 100, 80) == inside)[~rim].all()


@pytest.mark.parametrize(
    ("kind", "share"),
    [("circle", math.pi / 4), ("square", 1.0), ("triangle", 0.5), ("cross", 1 - 4 * (0.5 - 0.33 / 2) ** 2)],
)
def test_areas_are_those_of_geometry(kind: str, share: float) -> None:
    scene = Scene(400, 400, shapes=(Shape(kind, "blue", (200.0, 200.0), 300.0),))
    area = (draw_labels(scene, 400, 400) == 1).sum() / 300**2
    assert area == pytest.approx(share, rel=0.02)


def test_rotation_turns_clockwise() -> None:
    """A triangle turned by 90 degrees points right: less ink in the right half than in the left."""
    scene = Scene(100, 100, shapes=(Shape("triangle", "red", (50.0, 50.0), 60.0, rotation=90),))
    labels = draw_labels(scene, 100, 100)
    assert labels[:, 50:].sum() < 0.5 * labels[:, :50].sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_scenes_keep_their_promises(seed: int) -> None:
    rng = random.Random(seed)
    with_text = seed % 3 == 0
    scene = random_scene(rng, with_text=with_text)
    assert 60 <= min(scene.width, scene.height) <= max(scene.width, scene.height) <= 1200
    assert max(scene.width, scene.height) / min(scene.width, scene.height) <= 20
    assert (scene.text is not None) == with_text
    assert len(scene.shapes) <= 2 if with_text else 1 <= len(scene.shapes) <= 6
    if scene.text:
        assert 1 <= len(scene.text.characters) <= 6
    sizes = [s.size for s in scene.shapes]
    assert not sizes or max(sizes) <= 2.55 * min(sizes)
    assert all(s.kind in KINDS for s in scene.shapes)


def test_shapes_are_rarely_too_small_to_see() -> None:
    rng = random.Random(5)
    seen = [
        s.size * seen_scale(sc.width, sc.height) for _ in range(500) for sc in [random_scene(rng)] for s in sc.shapes
    ]
    assert np.quantile(seen, 0.01) >= 11


def test_the_same_seed_gives_the_same_picture_and_scale_only_resizes() -> None:
    one, two = (draw(random_scene(random.Random(3))) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    scene = Scene(
        300, 200, Ground((250, 250, 250), (180, 220, 250), 30.0), (Shape("heart", "red", (100.0, 90.0), 80.0),)
    )
    small = draw(scene, 0.5)
    assert small.size == (150, 100)
    resized = draw(scene).resize((150, 100), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(resized, float)).mean() < 0.5


def test_noise_has_its_deviation_and_gradients_their_ends() -> None:
    noisy = np.asarray(draw(Scene(200, 200, Ground((128, 128, 128), noise=20.0, seed=4))), float)
    assert noisy.std() == pytest.approx(20, rel=0.03)
    across = np.asarray(draw(Scene(200, 50, Ground((0, 0, 0), (200, 100, 50), 0.0))), float)
    assert np.abs(across[:, 0] - (0, 0, 0)).max() <= 1
    assert np.abs(across[:, -1] - (200, 100, 50)).max() <= 1


@pytest.mark.parametrize("font", ["aileron", "courier"])
def test_text_stands_where_it_should(font: str) -> None:
    scene = Scene(200, 100, text=Text("K7Q", (100.0, 50.0), 30.0, font=font))
    ys, xs = np.nonzero(np.asarray(draw(scene).convert("L")) < 128)
    assert abs((ys.min() + ys.max() + 1) / 2 - 50) <= 2
    assert abs((xs.min() + xs.max() + 1) / 2 - 100) <= 2
    assert ys.max() + 1 - ys.min() == pytest.approx(30, abs=3)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"blob.*circle"):
        Shape("blob", "red", (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match=r"beige.*red"):
        Shape("circle", "beige", (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="positive"):
        Shape("circle", "red", (0.0, 0.0), 0.0)
    with pytest.raises(ValueError, match="0x5"):
        Scene(0, 5)
    with pytest.raises(ValueError, match="sides"):
        random_scene(random.Random(0), sides=(100, 60))
    with pytest.raises(ValueError, match=r"comic.*aileron"):
        draw(Scene(50, 50, text=Text("A", (25.0, 25.0), 20.0, font="comic")))
