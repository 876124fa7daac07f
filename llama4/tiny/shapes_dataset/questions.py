"""Questions about scenes, in many wordings, and their answers: what the embedded model is trained and evaluated on.

Every answer has one canonical form, short enough to learn ("Red.", "A circle.", "Three.", "Yes.", "To the left.");
`is_right` also accepts the other forms a person would.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import permutations

from llama4.errors import Llama4Error
from llama4.tiny.shapes_dataset.answers import (
    CORE_KINDS,
    DIRECTIONS,
    KINDS_OF_QUESTION,
    NO_PICTURE,
    NO_TEXT,
    NUMBERS,
    OPPOSITE,
    REFUSAL,
    Question,
    count,
    describe,
    direction_from,
    is_towards,
    left_to_right,
    name_of,
    named_alone,
    orders,
    unique_colours,
    unique_kinds,
)
from llama4.tiny.shapes_dataset.pictures import COLOURS, KINDS, Scene, Shape
from llama4.tiny.shapes_dataset.scenes import random_scene
from llama4.tiny.shapes_dataset.wordings import (
    A_COLOURED,
    CAPTION,
    COLOUR_OF,
    COLOUR_OF_MANY,
    COLOUR_OF_ONLY,
    COUNT,
    COUNT_OF,
    EXISTS,
    NOUNS,
    OUTSIDE,
    PAIR_COLOUR,
    PAIR_MORE,
    RELATION_EITHER,
    RELATION_OPEN,
    RELATION_WHICH,
    RELATION_YES_NO,
    SHAPE_OF,
    SHAPE_OF_MANY,
    SHAPE_OF_ONLY,
    STRANGERS,
    TEXT,
    an,
    join,
    plural,
    say,
)

# ---------------------------------------------------------------------------------------------------- public


def ask(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """A random question about the scene, of one of the kinds that are asked about a single picture.

    Raises:
        Llama4Error: the scene has no clear answer to any question of that kind (a single shape has no relation).
    """
    if kind is not None and kind not in _MAKERS:
        raise Llama4Error(f"cannot ask {kind!r} about one picture; use one of {', '.join(_MAKERS)}")
    kinds = [kind] if kind else rng.sample(tuple(_MAKERS), len(_MAKERS))
    for name in kinds:
        question = _try(name, scene, rng)
        if question is not None:
            return question
    raise Llama4Error(f"no {kind} question has a clear answer in this scene; draw another one (see fresh_question)")


def fresh_question(
    rng: random.Random, kind: str, *, sides: tuple[int, int] = (60, 1200)
) -> tuple[list[Scene], list[Question]]:
    """New scenes and a question of `kind` about them.

    A "pair" has two scenes, "outside" one or none; a "follow_up" comes after the question that it refers to.

    Raises:
        Llama4Error: an unknown kind.
    """
    if kind not in KINDS_OF_QUESTION:
        raise Llama4Error(f"unknown kind of question {kind!r}; use one of {', '.join(KINDS_OF_QUESTION)}")
    number = rng.choice(NUMBERS[:7]) if kind in ("count_shape", "count_colour") else None
    while True:
        scene = random_scene(rng, sides=sides, with_text=kind == "text" and rng.random() < 0.95)
        if kind == "pair":
            other = random_scene(rng, sides=sides)
            return [scene, other], [ask_pair(scene, other, rng)]
        if kind == "outside":
            with_picture, about_picture = rng.choice(((True, False), (False, False), (False, True)))
            question = ask_without_picture(rng) if about_picture else ask_outside(rng)
            return [scene] if with_picture else [], [question]
        first = _try("" if kind == "follow_up" else kind, scene, rng)
        if first is None or (number and first.answer != f"{number}."):
            continue
        if kind != "follow_up":
            return [scene], [first]
        second = ask_follow_up(scene, first, rng)
        if second is not None:
            return [scene], [first, second]


def ask_many(scene: Scene, rng: random.Random, n: int) -> list[Question]:
    """Up to n different questions about one picture in random order, a follow-up after the question it refers to."""
    weights = dict(_WEIGHTS, text=3.0 if scene.text else 0.15)
    asked: list[Question] = []
    seen: set[tuple[str, str]] = set()
    names = tuple(weights)
    for _ in range(6 * n):
        if len(asked) >= n:
            break
        name = rng.choices(names, tuple(weights.values()))[0]
        question = ask_outside(rng) if name == "outside" else _try(name, scene, rng)
        if question is None or (key := (name, _core(question.text))) in seen:
            continue
        seen.add(key)
        if name in ("count", "caption", "text"):
            weights[name] = 0.0
        asked.append(question)
        if len(asked) < n and rng.random() < 0.25:
            follow_up = ask_follow_up(scene, question, rng)
            if follow_up is not None:
                asked.append(follow_up)
    return asked


def ask_pair(first: Scene, second: Scene, rng: random.Random) -> Question:
    """A question about two pictures: which has more of something, or the colour of a shape in one of them."""
    if rng.random() < 0.3:
        which, scene = rng.choice((("first", first), ("second", second)))
        unique = unique_kinds(scene)
        if unique:
            shape = rng.choice(unique)
            text = say(rng, PAIR_COLOUR, kind=shape.kind, which=which)
            return Question("pair", text, f"{shape.colour.capitalize()}.", about=shape)
    wanted = rng.choice((-1, 0, 1))
    things: list[tuple[str, int, int]] = [
        (rng.choice(("shapes", "shapes", "things", "objects")), len(first.shapes), len(second.shapes))
    ]
    for kind in KINDS:
        things.append((plural(kind), count(first, kind=kind), count(second, kind=kind)))
    for colour in COLOURS:
        noun = rng.choice(NOUNS)
        things.append((f"{colour} {plural(noun)}", count(first, colour=colour), count(second, colour=colour)))
    rng.shuffle(things)
    things.sort(key=lambda t: t[1] + t[2] == 0)  # what neither picture shows comes last
    thing, a, b = next((t for t in things if (t[1] > t[2]) - (t[1] < t[2]) == wanted and t[1] + t[2]), things[0])
    text = say(rng, PAIR_MORE, things=thing)
    if a == b:
        return Question("pair", text, "Both have the same number.", ("both", "the same", "same", "equal", "neither"))
    which = "first" if a > b else "second"
    return Question(
        "pair", text, f"The {which}.", (f"the {which} picture", f"the {which} one", f"picture {1 + (a < b)}")
    )


def ask_outside(rng: random.Random) -> Question:
    """A question that is not about pictures of shapes, asked with or without one; the answer says so."""
    return Question("outside", say(rng, OUTSIDE), REFUSAL)


def ask_without_picture(rng: random.Random) -> Question:
    """A question about a picture, to be asked without one."""
    _, questions = fresh_question(rng, rng.choice((*CORE_KINDS, "caption", "text")), sides=(300, 400))
    return Question("no_picture", questions[-1].text, NO_PICTURE)


def corpus(rng: random.Random, n: int) -> Iterator[str]:
    """2n strings, questions and answers in turn, of every kind: the text on which the vocabulary is trained.

    Texts found in pictures are spelt in capitals and digits ("K7Q"), to be read character by character: the vocabulary
    should have no merge of two capitals or of two digits, i.e. no entry that matches [A-Z0-9]{2,} as a whole.
    """
    for _ in range(n):
        kind = rng.choice((*KINDS_OF_QUESTION, "no_picture"))
        question = (
            ask_without_picture(rng) if kind == "no_picture" else fresh_question(rng, kind, sides=(300, 400))[1][-1]
        )
        yield question.text
        yield question.answer


# ------------------------------------------------------------------------------------------ questions by kind


def _try(kind: str, scene: Scene, rng: random.Random) -> Question | None:
    maker = _MAKERS[kind or rng.choice(("colour", "shape", "count_shape", "count_colour", "exists"))]
    return maker(scene, rng)


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.shapes:
        return None
    draw = rng.random()
    if len(scene.shapes) == 1 and draw < 0.25:
        return _colour_answer(say(rng, COLOUR_OF_ONLY), scene.shapes[0])
    absent = [k for k in KINDS if not count(scene, kind=k)]
    if absent and draw > 0.93:
        kind = rng.choice(absent)
        return Question("colour", say(rng, COLOUR_OF, kind=kind), f"There is no {kind}.", (f"no {kind}", "none"))
    unique = unique_kinds(scene)
    several = [k for k in KINDS if count(scene, kind=k) > 1]
    if several and (not unique or draw > 0.7):
        kind = rng.choice(several)
        alike = [s for s in left_to_right(scene) if s.kind == kind]
        names = list(dict.fromkeys(s.colour for s in alike))
        if len(names) > 3:
            return None
        text = say(rng, COLOUR_OF_MANY, kinds=plural(kind))
        return Question("colour", text, f"{join(names).capitalize()}.", orders(names))
    if not unique:
        return None
    shape = rng.choice(unique)
    return _colour_answer(say(rng, COLOUR_OF, kind=shape.kind), shape)


def _colour_answer(text: str, shape: Shape, kind: str = "colour") -> Question:
    accepts = (f"it is {shape.colour}", f"{shape.colour} {shape.kind}", f"the {shape.kind} is {shape.colour}")
    return Question(kind, text, f"{shape.colour.capitalize()}.", accepts, shape)


def _shape(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.shapes:
        return None
    draw = rng.random()
    if len(scene.shapes) == 1 and draw < 0.25:
        return _shape_answer(say(rng, SHAPE_OF_ONLY), scene.shapes[0])
    absent = [c for c in COLOURS if not count(scene, colour=c)]
    if absent and draw > 0.93:
        colour = rng.choice(absent)
        text = say(rng, SHAPE_OF, colour=colour, noun=rng.choice(NOUNS))
        return Question("shape", text, f"There is nothing {colour}.", (f"nothing {colour}", "nothing", "none"))
    unique = unique_colours(scene)
    several = [c for c in COLOURS if count(scene, colour=c) > 1]
    if several and (not unique or draw > 0.7):
        colour = rng.choice(several)
        kinds = list(dict.fromkeys(s.kind for s in left_to_right(scene) if s.colour == colour))
        if len(kinds) > 3:
            return None
        text = say(rng, SHAPE_OF_MANY, colour=colour, nouns=plural(rng.choice(NOUNS)))
        if len(kinds) == 1:
            n = NUMBERS[count(scene, colour=colour)]
            return Question("shape", text, f"{plural(kinds[0]).capitalize()}.", (kinds[0], f"{n} {plural(kinds[0])}"))
        names = [an(k) for k in kinds]
        return Question("shape", text, f"{join(names).capitalize()}.", orders(names))
    if not unique:
        return None
    shape = rng.choice(unique)
    return _shape_answer(say(rng, SHAPE_OF, colour=shape.colour, noun=rng.choice(NOUNS)), shape)


def _shape_answer(text: str, shape: Shape, kind: str = "shape") -> Question:
    accepts = (f"{shape.colour} {shape.kind}", f"it is a {shape.kind}")
    return Question(kind, text, f"{an(shape.kind).capitalize()}.", accepts, shape)


def _count_all(scene: Scene, rng: random.Random) -> Question | None:
    nouns = plural(rng.choice(NOUNS[:-1]))
    return _count_answer("count", say(rng, COUNT, nouns=nouns), len(scene.shapes))


def _count_shape(scene: Scene, rng: random.Random) -> Question | None:
    kind, n = _pick_count(rng, {k: count(scene, kind=k) for k in KINDS})
    only = next(s for s in scene.shapes if s.kind == kind) if n == 1 else None
    return _count_answer("count_shape", say(rng, COUNT_OF, things=plural(kind)), n, only)


def _count_colour(scene: Scene, rng: random.Random) -> Question | None:
    colour, n = _pick_count(rng, {c: count(scene, colour=c) for c in COLOURS})
    only = next(s for s in scene.shapes if s.colour == colour) if n == 1 else None
    things = f"{colour} {plural(rng.choice(NOUNS))}"
    return _count_answer("count_colour", say(rng, COUNT_OF, things=things), n, only)


def _count_answer(kind: str, text: str, n: int, about: Shape | None = None) -> Question:
    return Question(kind, text, f"{NUMBERS[n]}.", about=about)


def _pick_count(rng: random.Random, counts: dict[str, int]) -> tuple[str, int]:
    """A name and its count; counts that are rare among random scenes are preferred."""
    absent = [name for name, n in counts.items() if n == 0]
    names = [name for name, n in counts.items() if n] + ([rng.choice(absent)] if absent else [])
    name = rng.choices(names, [(0.35, 0.25, 1.0, 3.0, 8.0, 12.0, 16.0)[min(6, counts[n])] for n in names])[0]
    return name, counts[name]


def _exists(scene: Scene, rng: random.Random) -> Question | None:
    """Yes and no are equally frequent; most things that are not there have a colour and a shape that are."""
    if not scene.shapes:
        return None
    yes = rng.random() < 0.5
    form = rng.choices(("both", "kind", "colour"), (5, 3, 2))[0]
    kinds = {s.kind for s in scene.shapes}
    colours = {s.colour for s in scene.shapes}
    if yes:
        shape = rng.choice(scene.shapes)
        colour, kind = shape.colour, shape.kind
    else:
        there = {(s.colour, s.kind) for s in scene.shapes}
        if form == "both":
            mixed = [(c, k) for c in COLOURS for k in KINDS if c in colours and k in kinds and (c, k) not in there]
            half = [(c, k) for c in COLOURS for k in KINDS if (c in colours) != (k in kinds)]
            neither = [(c, k) for c in COLOURS for k in KINDS if c not in colours and k not in kinds]
            options = mixed if mixed and rng.random() < 0.6 else half if rng.random() < 0.8 else neither or half
        else:
            options = [
                (c, k) for c in COLOURS for k in KINDS if (c not in colours if form == "colour" else k not in kinds)
            ]
        if not options:
            return None
        colour, kind = rng.choice(options)
        if form == "kind" and rng.random() < 0.08:
            kind = rng.choice(STRANGERS)
    if form == "colour":
        text = say(rng, A_COLOURED, colour=colour, noun=rng.choice(NOUNS))
    else:
        thing = kind if form == "kind" else f"{colour} {kind}"
        text = say(rng, EXISTS, thing=an(thing), things=plural(thing))
    matching = [s for s in scene.shapes if form == "colour" or s.kind == kind if form == "kind" or s.colour == colour]
    return Question("exists", text, "Yes." if yes else "No.", about=matching[0] if len(matching) == 1 else None)


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    pairs = [
        (a, b, direction)
        for a, b in permutations(scene.shapes, 2)
        if (direction := direction_from(a, b)) and named_alone(scene, a) and named_alone(scene, b)
    ]
    if not pairs:
        return None
    wanted = rng.choice(tuple(DIRECTIONS))
    a, b, direction = rng.choice([p for p in pairs if p[2] == wanted] or pairs)
    answer = DIRECTIONS[direction]
    accepts = {
        "left": ("left", "on the left", "left of it"),
        "right": ("right", "on the right", "right of it"),
        "above": ("over it", "above it", "on top"),
        "below": ("under it", "below it", "under", "beneath"),
    }[direction]
    x, y = name_of(scene, a, rng), name_of(scene, b, rng)
    draw = rng.random()
    if draw < 0.4:
        return Question("relation", say(rng, RELATION_OPEN, x=x, y=y), answer, accepts, a)
    if draw < 0.6:
        form = "sideways" if direction in ("left", "right") else "upright"
        return Question("relation", say(rng, RELATION_EITHER[form], x=x, y=y), answer, accepts, a)
    if draw < 0.85:
        yes = rng.random() < 0.5
        told = direction if yes else OPPOSITE[direction]
        return Question("relation", say(rng, RELATION_YES_NO[told], x=x, y=y), "Yes." if yes else "No.", about=a)
    beside = [s for s in scene.shapes if s is not b and is_towards(s, b, direction)]
    if beside != [a]:
        return Question("relation", say(rng, RELATION_OPEN, x=x, y=y), answer, accepts, a)
    thing = f"{a.colour} {a.kind}"
    return Question("relation", say(rng, RELATION_WHICH[direction], y=y), f"{an(thing).capitalize()}.", (a.kind,), a)


def _text(scene: Scene, rng: random.Random) -> Question | None:
    return Question("text", say(rng, TEXT), scene.text.characters if scene.text else NO_TEXT, ("nothing", "no text"))


def _caption(scene: Scene, rng: random.Random) -> Question | None:
    return Question("caption", say(rng, CAPTION), describe(scene))


_MAKERS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count_all,
    "count_shape": _count_shape,
    "count_colour": _count_colour,
    "exists": _exists,
    "relation": _relation,
    "text": _text,
    "caption": _caption,
}
_WEIGHTS = {
    "colour": 2.0,
    "shape": 2.0,
    "count": 0.8,
    "count_shape": 2.0,
    "count_colour": 2.0,
    "exists": 3.0,
    "relation": 3.0,
    "caption": 0.4,
    "outside": 0.3,
}


def ask_follow_up(scene: Scene, before: Question, rng: random.Random) -> Question | None:
    """A question that only makes sense after `before` ("And the square?", "What colour is it?"); None if none does."""
    options: list[Question] = []
    about = before.about
    if before.kind == "colour" and about:
        options += [
            _colour_answer(
                say(rng, ("And the {kind}?", "What about the {kind}?", "And that of the {kind}?"), kind=s.kind), s
            )
            for s in unique_kinds(scene)
            if s is not about
        ]
    elif before.kind == "shape" and about:
        wordings = ("And the {colour} one?", "What about the {colour} one?", "And what is the {colour} one?")
        options += [
            _shape_answer(say(rng, wordings, colour=s.colour), s) for s in unique_colours(scene) if s is not about
        ]
    elif before.kind in ("count_shape", "count_colour"):
        wordings = ("And {things}?", "And how many {things}?", "What about {things}?")
        told = before.text.lower()
        if before.kind == "count_shape":
            counts = {plural(k): count(scene, kind=k) for k in KINDS if plural(k) not in told}
        else:
            counts = {f"{c} ones": count(scene, colour=c) for c in COLOURS if c not in told}
        if any(counts.values()) and rng.random() < 0.75:
            counts = {thing: n for thing, n in counts.items() if n}
        thing, n = _pick_count(rng, counts)
        options.append(_count_answer("follow_up", say(rng, wordings, things=thing), n))
    named_colour = any(c in before.text.lower() for c in COLOURS)
    if about and before.kind in ("exists", "count_shape") and not named_colour:
        asks = ("What colour is it?", "And its colour?", "Which colour does it have?", "What is its colour?")
        options.append(_colour_answer(say(rng, asks), about))
    if about and before.kind in ("exists", "shape", "colour", "count_shape", "count_colour"):
        others = [
            (s, d) for s in scene.shapes if s is not about and (d := direction_from(about, s)) and named_alone(scene, s)
        ]
        if others:
            other, direction = rng.choice(others)
            wordings = (
                "Where is it relative to {y}?",
                "And where is it, seen from {y}?",
                "Where is it compared to {y}?",
            )
            text = say(rng, wordings, y=name_of(scene, other, rng))
            options.append(Question("follow_up", text, DIRECTIONS[direction], (direction, f"on the {direction}")))
    if not options:
        return None
    chosen = rng.choice(options)
    return Question("follow_up", chosen.text, chosen.answer, chosen.accepts, chosen.about)


def _core(text: str) -> str:
    """A question in lower case without punctuation, to recognise repeated questions."""
    return re.sub(r"[^a-z ]", "", text.lower())
