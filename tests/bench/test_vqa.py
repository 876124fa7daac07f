"""The accuracy table against answerers whose accuracy is known."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from llama4.bench.vqa import Messages, evaluate, table, wilson
from llama4.tiny.shapes_dataset import KINDS_OF_QUESTION, Question


def test_wilson_equals_published_values() -> None:
    """Newcombe (1998), Statistics in Medicine 17, table I, method 3."""
    for right, asked, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_who_knows_is_always_right_and_who_says_yes_half_the_time() -> None:
    asked: list[Question] = []
    evaluate(lambda batch: [""] * len(batch), 40, seed=3, sides=(60, 90), on_answer=lambda q, said, ok: asked.append(q))
    key = iter(asked)
    rows = evaluate(lambda batch: [next(key).answer for _ in batch], 40, seed=3, sides=(60, 90))
    assert [r.kind for r in rows] == list(KINDS_OF_QUESTION)
    assert all(r.share == 1.0 and r.asked == 40 for r in rows)
    (exists,) = evaluate(lambda batch: ["yes"] * len(batch), 200, sides=(60, 90), kinds=["exists"])
    assert 0.4 < exists.share < 0.6


def test_conversations_are_in_the_common_format() -> None:
    def check(batch: list[Messages]) -> list[str]:
        for messages in batch:
            assert [m["role"] for m in messages] in (["user"], ["user", "assistant", "user"])
            parts = [part for m in messages for part in m["content"]]
            assert {part["type"] for part in parts} <= {"image", "text"}
            assert all(isinstance(p["image"], Image.Image) for p in parts if p["type"] == "image")
            sizes.append(sum(p["type"] == "image" for p in parts))
        return [""] * len(batch)

    for kind, images in (("colour", {1}), ("pair", {2}), ("follow_up", {1}), ("outside", {0, 1})):
        sizes: list[int] = []
        evaluate(check, 12, seed=random.Random(1).randrange(99), kinds=[kind], batch_size=5, sides=(60, 90))
        assert set(sizes) == images and len(sizes) == 12


def test_the_table_names_every_kind() -> None:
    rows = evaluate(lambda batch: ["Red."] * len(batch), 5, kinds=["colour", "text"], sides=(60, 90))
    lines = table(rows).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("colour")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="per_kind"):
        evaluate(lambda batch: [], 0)
