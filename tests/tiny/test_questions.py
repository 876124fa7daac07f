"""Answers against what an independent reader measures in the label map and the pixels."""

from __future__ import annotations

import functools
import random
import re
from collections import Counter

import numpy as np
import pytest

from llama4.tiny.shapes_dataset import (
    COLOURS,
    CORE_KINDS,
    KINDS,
    KINDS_OF_QUESTION,
    Ground,
    Question,
    Scene,
    Shape,
    Text,
    ask,
    ask_many,
    corpus,
    describe,
    draw,
    draw_labels,
    fresh_question,
    is_right,
    normalise,
)
from llama4.tiny.shapes_dataset.answers import NUMBERS

Seen = list[tuple[str, str, float, float]]  # kind, colour, x, y


def look(scene: Scene) -> Seen:
    """The shapes as measured: colour of the median pixel, centre of the box of the covered pixels."""
    scale = 300 / max(scene.width, scene.height)
    picture = np.asarray(draw(scene, scale), float)
    labels = draw_labels(scene, picture.shape[1], picture.shape[0])
    seen = []
    for i, shape in enumerate(scene.shapes):
        rgb = np.median(picture[labels == i + 1], axis=0)
        colour = min(COLOURS, key=lambda c: min(float(((rgb - np.array(v)) ** 2).sum()) for v in COLOURS[c]))
        ys, xs = np.nonzero(labels == i + 1)
        seen.append((shape.kind, colour, (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2))
    return seen


def words(question: Question) -> str:
    text = question.text.lower().replace("color", "colour")
    return re.sub(r"\bcrosses\b", "cross", re.sub(r"\b(circle|square|triangle|star|heart)s\b", r"\1", text))


def named(text: str) -> tuple[str | None, str | None]:
    """The kind and the colour that a piece of text mentions."""
    kind = re.search(r"\b(" + "|".join(KINDS) + r")\b", text)
    colour = re.search(r"\b(" + "|".join(COLOURS) + r")\b", text)
    return kind and kind[1], colour and colour[1]


def fitting(seen: Seen, name: tuple[str | None, str | None]) -> Seen:
    return [s for s in seen if name[0] in (None, s[0]) and name[1] in (None, s[1])]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("kind", ["count", "count_shape", "count_colour"])
def test_counts(kind: str, seed: int) -> None:
    (scene,), (question,) = fresh_question(random.Random(seed), kind)
    assert question.answer == NUMBERS[len(fitting(look(scene), named(words(question))))] + "."


@pytest.mark.parametrize("seed", range(100))
def test_exists(seed: int) -> None:
    (scene,), (question,) = fresh_question(random.Random(seed), "exists")
    name = named(words(question))
    there = fitting(look(scene), name) if name != (None, None) else []
    assert question.answer == ("Yes." if there else "No.")


@pytest.mark.parametrize("seed", range(100))
def test_colours_and_shapes(seed: int) -> None:
    for kind, slot in (("colour", 1), ("shape", 0)):
        (scene,), (question,) = fresh_question(random.Random(seed), kind)
        seen = look(scene)
        found = sorted(fitting(seen, named(words(question))), key=lambda s: s[2])
        told = re.findall("|".join(COLOURS if slot else KINDS), question.answer.lower())
        if question.answer.startswith("There is no"):
            assert not found
        elif abs(min((a[2] - b[2] for a, b in zip(found[1:], found, strict=False)), default=9.0)) > 2:
            assert told == list(dict.fromkeys(s[slot] for s in found))


@pytest.mark.parametrize("seed", range(200))
def test_relations(seed: int) -> None:
    (scene,), (question,) = fresh_question(random.Random(seed), "relation")
    seen, text = look(scene), words(question)
    names = [m for m in re.findall(rf"the ((?:(?:{'|'.join(COLOURS)}) )?(?:[a-z]+))", text) if named(m) != (None, None)]
    told = {"To the left.": (-1, 0), "To the right.": (1, 0), "Above.": (0, -1), "Below.": (0, 1)}
    if len(names) == 1:  # "What is left of the star?" -> "A red circle."
        (anchor,) = fitting(seen, named(names[0]))
        (thing,) = fitting(seen, named(question.answer.lower()))
        word = re.search(r"left|right|above|over|below|under", text)
        assert word
        axis = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "over": (0, -1)}.get(word[0], (0, 1))
        along = (thing[2] - anchor[2]) * axis[0] + (thing[3] - anchor[3]) * axis[1]
        assert along > 0
        return
    text = re.sub(r"^(please tell me: |look at the picture. |hey, |a question: |now, |tell me, |so, )", "", text)
    anchor_first = re.match(r"(?:seen from|relative to|left or right of|above or below|on which side)", text)
    assert len(names) == 2, text
    x, y = reversed(names) if anchor_first else names
    (a,), (b,) = fitting(seen, named(x)), fitting(seen, named(y))
    dx, dy = a[2] - b[2], a[3] - b[3]
    truth = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
    if question.answer in told:
        assert told[question.answer] == truth
    else:
        word = re.search(r"left|right|above|over|higher|below|under|lower", text)
        assert word
        asked = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "over": (0, -1), "higher": (0, -1)}
        assert (question.answer == "Yes.") == (asked.get(word[0], (0, 1)) == truth)


@pytest.mark.parametrize("seed", range(60))
def test_pairs(seed: int) -> None:
    (first, second), (question,) = fresh_question(random.Random(seed), "pair")
    name, text = named(words(question)), words(question)
    if "colour" in text:
        scene = first if "first" in text else second
        (thing,) = fitting(look(scene), name)
        assert question.answer == f"{thing[1].capitalize()}."
    else:
        a, b = (len(fitting(look(s), name)) for s in (first, second))
        told = "The first." if a > b else "The second." if b > a else "Both have the same number."
        assert question.answer == told


SCENE = Scene(
    300,
    200,
    Ground(),
    (
        Shape("circle", "red", (50.0, 100.0), 40.0),
        Shape("square", "blue", (150.0, 100.0), 40.0),
        Shape("square", "blue", (250.0, 40.0), 40.0),
    ),
    Text("K7Q", (100.0, 170.0), 20.0),
)


def test_captions() -> None:
    assert describe(SCENE) == "A red circle, two blue squares and the text K7Q."
    assert describe(Scene(10, 10, shapes=(Shape("star", "orange", (5.0, 5.0), 4.0),))) == "An orange star."
    question = ask(SCENE, random.Random(0), "caption")
    assert is_right(question, "two blue squares, the text K7Q and a red circle")
    assert not is_right(question, "Two blue squares and a red circle.")


def test_texts() -> None:
    question = ask(SCENE, random.Random(0), "text")
    assert question.answer == "K7Q"
    assert is_right(question, "k 7 q.")
    assert not is_right(question, "K7O")
    assert ask(Scene(10, 10), random.Random(0), "text").answer == "There is no text."


@pytest.mark.parametrize("kind", KINDS_OF_QUESTION)
def test_the_true_answer_is_right_and_nonsense_is_not(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(50):
        question = fresh_question(rng, kind)[1][-1]
        assert is_right(question, question.answer)
        assert is_right(question, question.answer.upper().rstrip("."))
        assert not is_right(question, "")
        assert not is_right(question, "Perhaps.")


def test_normalise() -> None:
    assert normalise("  The RED Circle! ") == normalise("a red circle") == "red circle"
    assert normalise("3") == normalise("Three.") == "three"
    assert normalise("0") == normalise("None.")
    assert normalise("To the left.") == normalise("to left")


@functools.cache
def many() -> dict[str, list[Question]]:
    """Of each core kind 400 questions."""
    rng = random.Random(11)
    return {kind: [fresh_question(rng, kind, sides=(200, 400))[1][-1] for _ in range(400)] for kind in CORE_KINDS}


def test_answers_are_balanced() -> None:
    """Nobody who never looks gets far: no answer of a core kind is given in much more than its even share."""
    asked = many()
    for kind, ways in {"count": 6, "count_shape": 7, "count_colour": 7, "exists": 2, "shape": 6, "colour": 7}.items():
        told = Counter(question.answer for question in asked[kind])
        assert max(told.values()) / 400 < 1.35 / ways, (kind, told.most_common(3))
    told = Counter(question.answer for question in asked["relation"])
    assert 0.7 < told["Yes."] / told["No."] < 1.4
    sides = [told[d] for d in ("To the left.", "To the right.", "Above.", "Below.")]
    assert max(sides) < 1.5 * min(sides)


def test_wordings_vary() -> None:
    for asked in many().values():
        texts = [question.text for question in asked]
        shapes = {re.sub("|".join((*COLOURS, *KINDS)), "_", t.lower().replace("color", "colour")) for t in texts}
        assert len(shapes) >= 16
        assert any(t.isupper() for t in texts)
        assert any(t.islower() for t in texts)
        assert 0.3 < sum(t.endswith("?") for t in texts) / len(texts) < 0.95


def test_a_conversation_asks_different_things_and_follow_ups_follow() -> None:
    rng = random.Random(4)
    followed = 0
    for _ in range(100):
        asked = ask_many(SCENE, rng, 10)
        assert 1 <= len(asked) <= 10
        assert len({(q.kind, q.text.lower()) for q in asked if q.kind != "follow_up"}) >= len(asked) / 2
        assert asked[0].kind != "follow_up"
        followed += any(q.kind == "follow_up" for q in asked)
    assert followed > 30


def test_what_cannot_be_asked_is_named() -> None:
    lone = Scene(50, 50, shapes=(Shape("circle", "red", (25.0, 25.0), 20.0),))
    with pytest.raises(ValueError, match="relation"):
        ask(lone, random.Random(0), "relation")
    with pytest.raises(ValueError, match=r"smell.*colour"):
        ask(lone, random.Random(0), "smell")


def test_the_corpus_holds_every_word_of_the_answers() -> None:
    text = " ".join(corpus(random.Random(0), 1000))
    assert all(re.search(rf"\b{word}\b", text) for word in (*COLOURS, *KINDS, "Yes", "None", "Six", "left"))
