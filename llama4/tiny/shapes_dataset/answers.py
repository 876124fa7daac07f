"""What is true of a scene, and whether an answer is right."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from llama4.tiny.shapes_dataset.pictures import Scene, Shape
from llama4.tiny.shapes_dataset.wordings import NOUNS, an, join, plural

CORE_KINDS = ("colour", "shape", "count", "count_shape", "count_colour", "exists", "relation")
KINDS_OF_QUESTION = (*CORE_KINDS, "text", "caption", "pair", "follow_up", "outside")

REFUSAL = "I can only answer questions about drawings of coloured shapes and short texts."
NO_PICTURE = "Please show me a picture."
NO_TEXT = "There is no text."
NUMBERS = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
DIRECTIONS = {"left": "To the left.", "right": "To the right.", "above": "Above.", "below": "Below."}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer.

    Attributes:
        answer: in its canonical form.
        accepts: other right answers.
        about: the shape that a follow-up question may refer to.
    """

    kind: str
    text: str
    answer: str
    accepts: tuple[str, ...] = ()
    about: Shape | None = None


def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, British spelling, numbers as words."""
    words = re.findall(r"[a-z0-9]+", answer.lower().replace("color", "colour"))
    numbers = {str(i): word.lower() for i, word in enumerate(NUMBERS)} | {"zero": "none"}
    return " ".join(numbers.get(w, w) for w in words if w not in ("a", "an", "the"))


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer means what the canonical one means; case, punctuation, articles and order do not matter."""
    if question.kind == "text" and question.answer != NO_TEXT:
        return re.sub(r"[^A-Z0-9]", "", answer.upper()) == question.answer
    if question.kind == "caption":
        return _items(answer) == _items(question.answer)
    return normalise(answer) in {normalise(a) for a in (question.answer, *question.accepts)}


def _items(caption: str) -> list[str]:
    return sorted(normalise(part) for part in re.split(r",| and ", caption.lower()))


def describe(scene: Scene) -> str:
    """The caption: "A red circle, two blue squares and the text K7Q." in order from left to right."""
    ordered = sorted(scene.shapes, key=lambda s: s.centre[0])
    groups = Counter((s.colour, s.kind) for s in ordered)
    parts = [
        an(f"{colour} {kind}") if n == 1 else f"{NUMBERS[n].lower()} {colour} {plural(kind)}"
        for (colour, kind), n in groups.items()
    ]
    if scene.text is not None:
        parts.append(f"the text {scene.text.characters}")
    if not parts:
        return "An empty picture."
    line = join(parts)
    return line[0].upper() + line[1:] + "."


def count(scene: Scene, *, kind: str | None = None, colour: str | None = None) -> int:
    """How many shapes have that kind and that colour."""
    return sum(kind in (None, s.kind) and colour in (None, s.colour) for s in scene.shapes)


def unique_kinds(scene: Scene) -> list[Shape]:
    """The shapes that are the only ones of their kind."""
    return [s for s in scene.shapes if count(scene, kind=s.kind) == 1]


def unique_colours(scene: Scene) -> list[Shape]:
    """The shapes that are the only ones of their colour."""
    return [s for s in scene.shapes if count(scene, colour=s.colour) == 1]


def left_to_right(scene: Scene) -> list[Shape]:
    """The shapes, sorted by their centres."""
    return sorted(scene.shapes, key=lambda s: s.centre[0])


def named_alone(scene: Scene, shape: Shape) -> bool:
    """Whether no other shape has the same kind and colour."""
    return count(scene, kind=shape.kind, colour=shape.colour) == 1


def name_of(scene: Scene, shape: Shape, rng: random.Random) -> str:
    """A name that fits this shape alone: by its kind, by its colour, or by both."""
    names = [f"the {shape.colour} {shape.kind}"]
    if count(scene, kind=shape.kind) == 1:
        names.append(f"the {shape.kind}")
    if count(scene, colour=shape.colour) == 1:
        names.append(f"the {shape.colour} {rng.choice(NOUNS)}")
    return rng.choice(names)


def is_towards(a: Shape, b: Shape, direction: str) -> bool:
    """Whether a's centre lies on that side of b's, however little."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    return {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[direction]


def direction_from(a: Shape, b: Shape) -> str | None:
    """Where a is, seen from b ("left", "above", ...), if one axis clearly dominates."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if abs(dx) >= 1.6 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def orders(names: Sequence[str]) -> tuple[str, ...]:
    """The enumeration of the names in every order."""
    return tuple(join(list(order)) for order in permutations(names))
