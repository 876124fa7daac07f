"""Several wordings of every question, in upper or lower case, with or without a question mark."""

from __future__ import annotations

import random
from collections.abc import Sequence

NOUNS = ("shape", "thing", "object", "figure", "one")

COLOUR_OF = (
    "What colour is the {kind}?",
    "What is the colour of the {kind}?",
    "Which colour does the {kind} have?",
    "What colour does the {kind} have?",
    "Which colour is the {kind}?",
    "The {kind} is what colour?",
    "Tell me the colour of the {kind}.",
    "Name the {kind}'s colour.",
    "In what colour is the {kind} drawn?",
    "What's the colour of the {kind}?",
    "Can you tell what colour the {kind} is?",
    "Colour of the {kind}?",
)
COLOUR_OF_MANY = (
    "What colour are the {kinds}?",
    "What colours are the {kinds}?",
    "Which colours do the {kinds} have?",
    "What are the colours of the {kinds}?",
    "Which colour are the {kinds}?",
    "Tell me the colours of the {kinds}.",
    "Name the colours of the {kinds}.",
    "In which colours are the {kinds} drawn?",
)
COLOUR_OF_ONLY = (
    "What colour is it?",
    "What colour is the shape?",
    "Which colour does the shape have?",
    "What is the colour of this?",
    "What colour is this thing?",
    "Name the colour of the shape.",
    "Which colour is this?",
    "What colour do you see?",
)
SHAPE_OF = (
    "What shape is the {colour} {noun}?",
    "What is the {colour} {noun}?",
    "Which shape does the {colour} {noun} have?",
    "Which shape is {colour}?",
    "What shape is {colour}?",
    "What is {colour}?",
    "What kind of shape is the {colour} {noun}?",
    "Tell me the shape of the {colour} {noun}.",
    "Name the {colour} {noun}.",
    "The {colour} {noun} is what shape?",
    "What's the shape of the {colour} {noun}?",
    "What is the {colour} {noun} called?",
    "What {colour} {noun} is there?",
)
SHAPE_OF_MANY = (
    "What shapes are the {colour} {nouns}?",
    "What are the {colour} {nouns}?",
    "Which shapes are {colour}?",
    "What shapes are {colour}?",
    "What shape are the {colour} {nouns}?",
    "Which shapes do the {colour} {nouns} have?",
    "Name the {colour} {nouns}.",
    "What {colour} {nouns} are there?",
)
SHAPE_OF_ONLY = (
    "What shape is it?",
    "What shape is this?",
    "What shape do you see?",
    "Which shape is in the picture?",
    "What shape is shown?",
    "Name the shape.",
    "What kind of shape is this?",
    "Which shape is drawn here?",
)
COUNT = (
    "How many {nouns} are there?",
    "How many {nouns} are in the picture?",
    "How many {nouns} do you see?",
    "How many {nouns} can you see?",
    "Count the {nouns}.",
    "How many {nouns} are there in all?",
    "How many {nouns} are there in total?",
    "What is the number of {nouns}?",
    "How many {nouns} does the picture show?",
    "Tell me how many {nouns} there are.",
    "How many {nouns} are drawn here?",
    "How many {nouns}?",
)
COUNT_OF = (
    "How many {things} are there?",
    "How many {things} are in the picture?",
    "How many {things} do you see?",
    "How many {things} can you see?",
    "Count the {things}.",
    "What is the number of {things}?",
    "How many {things} does the picture show?",
    "Tell me how many {things} there are.",
    "How many {things} are drawn here?",
    "How many {things}?",
    "How many {things} are shown?",
)
EXISTS = (
    "Is there {thing}?",
    "Is there {thing} in the picture?",
    "Do you see {thing}?",
    "Can you see {thing}?",
    "Does the picture show {thing}?",
    "Does the picture contain {thing}?",
    "Is {thing} in the picture?",
    "Is one of the shapes {thing}?",
    "Are there any {things}?",
    "Do you see any {things}?",
    "Can you find {thing}?",
    "Is {thing} drawn here?",
)
A_COLOURED = (
    "Is there anything {colour}?",
    "Is anything {colour}?",
    "Is there a {colour} {noun}?",
    "Is there something {colour} in the picture?",
    "Do you see anything {colour}?",
    "Can you see a {colour} {noun}?",
    "Is any shape {colour}?",
    "Is one of the shapes {colour}?",
    "Does the picture show a {colour} {noun}?",
    "Are any of the shapes {colour}?",
)
RELATION_OPEN = (
    "Where is {x} relative to {y}?",
    "Where is {x} compared to {y}?",
    "Where is {x} with respect to {y}?",
    "Where is {x}, seen from {y}?",
    "Seen from {y}, where is {x}?",
    "In which direction is {x} from {y}?",
    "Where does {x} lie relative to {y}?",
    "What is the position of {x} relative to {y}?",
    "On which side of {y} is {x}?",
    "Is {x} left, right, above or below {y}?",
    "Relative to {y}, where is {x}?",
)
RELATION_EITHER = {
    "sideways": (
        "Is {x} left or right of {y}?",
        "Is {x} to the left or to the right of {y}?",
        "Is {x} on the left or the right of {y}?",
        "Is {x} right or left of {y}?",
        "Left or right of {y}: where is {x}?",
        "Does {x} lie left or right of {y}?",
    ),
    "upright": (
        "Is {x} above or below {y}?",
        "Is {x} below or above {y}?",
        "Is {x} over or under {y}?",
        "Above or below {y}: where is {x}?",
        "Does {x} lie above or below {y}?",
        "Is {x} higher or lower than {y}?",
    ),
}
RELATION_YES_NO = {
    "left": (
        "Is {x} to the left of {y}?",
        "Is {x} left of {y}?",
        "Is {x} on the left of {y}?",
        "Does {x} lie left of {y}?",
        "Can you see {x} to the left of {y}?",
    ),
    "right": (
        "Is {x} to the right of {y}?",
        "Is {x} right of {y}?",
        "Is {x} on the right of {y}?",
        "Does {x} lie right of {y}?",
        "Can you see {x} to the right of {y}?",
    ),
    "above": (
        "Is {x} above {y}?",
        "Is {x} over {y}?",
        "Is {x} higher than {y}?",
        "Does {x} lie above {y}?",
        "Can you see {x} above {y}?",
    ),
    "below": (
        "Is {x} below {y}?",
        "Is {x} under {y}?",
        "Is {x} lower than {y}?",
        "Does {x} lie below {y}?",
        "Can you see {x} below {y}?",
    ),
}
RELATION_WHICH = {
    "left": ("What is to the left of {y}?", "What is left of {y}?", "What do you see to the left of {y}?"),
    "right": ("What is to the right of {y}?", "What is right of {y}?", "What do you see to the right of {y}?"),
    "above": ("What is above {y}?", "What is over {y}?", "What do you see above {y}?"),
    "below": ("What is below {y}?", "What is under {y}?", "What do you see below {y}?"),
}
TEXT = (
    "What does it say?",
    "What does the text say?",
    "What text is in the picture?",
    "Read the text.",
    "What is written in the picture?",
    "What is written here?",
    "Which letters do you see?",
    "What does the picture say?",
    "Can you read the text?",
    "What text do you see?",
    "Read it to me.",
    "What is the text?",
)
CAPTION = (
    "Describe the picture.",
    "What is in the picture?",
    "What do you see?",
    "What does the picture show?",
    "Describe the image.",
    "Give me a caption.",
    "Describe what you see.",
    "What is shown here?",
    "What can you see?",
    "Describe this picture in one sentence.",
    "What is this?",
    "What is drawn here?",
)
PAIR_MORE = (
    "Which picture has more {things}?",
    "Which image has more {things}?",
    "Which of the two pictures has more {things}?",
    "Which picture shows more {things}?",
    "Which one has more {things}?",
    "Does the first or the second picture have more {things}?",
    "In which picture are there more {things}?",
    "Where are more {things}, in the first or in the second picture?",
    "Are there more {things} in the first or in the second picture?",
)
PAIR_COLOUR = (
    "What colour is the {kind} in the {which} picture?",
    "In the {which} picture, what colour is the {kind}?",
    "What is the colour of the {kind} in the {which} picture?",
    "Which colour does the {kind} in the {which} picture have?",
    "The {kind} in the {which} picture is what colour?",
)

STRANGERS = ("dog", "cat", "house", "car", "tree", "person", "flower", "bird", "boat", "face", "fish", "chair", "horse")
_PLACES = (
    "France",
    "Japan",
    "Italy",
    "Canada",
    "Brazil",
    "Egypt",
    "Spain",
    "Kenya",
    "China",
    "Norway",
    "Peru",
    "India",
)
_PEOPLE = ("Hamlet", "Faust", "the Odyssey", "Don Quixote", "War and Peace", "the Bible", "Macbeth", "Ulysses")
_TOPICS = ("love", "the sea", "autumn", "my cat", "the moon", "winter", "a robot", "coffee", "football", "dragons")
_TONGUES = ("French", "German", "Spanish", "Latin", "Japanese", "Chinese", "Italian", "Greek")
_NUMBERS = tuple(str(n) for n in range(1, 100))
OUTSIDE = (
    *(f"What is the capital of {p}?" for p in _PLACES),
    *(f"How many people live in {p}?" for p in _PLACES),
    *(f"Where is {p}?" for p in _PLACES[:6]),
    *(f"Who wrote {w}?" for w in _PEOPLE),
    *(f"Write a poem about {t}." for t in _TOPICS),
    *(f"Tell me a story about {t}." for t in _TOPICS),
    *(f"Tell me about {t}." for t in _TOPICS),
    *(f"Explain {t} to me." for t in ("gravity", "evolution", "black holes", "democracy", "chess", "inflation")),
    *(f"Translate {w} into {t}." for w in ("this", "hello", "good morning") for t in _TONGUES),
    *(
        f"How do I {w}?"
        for w in ("bake bread", "learn to swim", "fix my bike", "cook rice", "sleep better", "make tea")
    ),
    *(
        f"What is {a} {op} {b}?"
        for a, b in zip(_NUMBERS[::4], _NUMBERS[3::4], strict=False)
        for op in ("plus", "times")
    ),
    *(f"What is {a}{op}{b}?" for a, b in zip(_NUMBERS[1::5], _NUMBERS[4::5], strict=False) for op in (" + ", "*")),
    *(f"Write a {w} program." for w in ("Python", "C", "Java", "Rust")),
    *(f"Who is {w}?" for w in ("the president", "Einstein", "Napoleon", "your maker", "the king of England")),
    "Hello!",
    "Hi.",
    "Good morning.",
    "How are you?",
    "Who are you?",
    "What is your name?",
    "What can you do?",
    "How old are you?",
    "What time is it?",
    "What day is it today?",
    "How is the weather?",
    "Will it rain tomorrow?",
    "Tell me a joke.",
    "Sing me a song.",
    "What is the meaning of life?",
    "Do you like music?",
    "Who won the match?",
    "Give me a recipe for soup.",
    "What is the price of gold?",
    "Why is the sky blue?",
    "Where do you live?",
    "Are you a robot?",
    "Who took this photo?",
    "When was this picture taken?",
    "How much does it cost?",
    "Is this person happy?",
    "What breed is the dog?",
)

_OPENINGS = ("Please tell me: ", "Look at the picture. ", "Hey, ", "A question: ", "Now, ", "Tell me, ", "So, ")


def say(rng: random.Random, wordings: Sequence[str], **slots: str) -> str:
    """One of the wordings, filled in, with random spelling (colour, color), case and punctuation."""
    text = rng.choice(wordings).format(**slots)
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    if rng.random() < 0.4:
        text = text.replace("olour", "olor")
    if rng.random() < 0.08:
        opening = rng.choice(_OPENINGS)
        text = opening + (text if opening.endswith(". ") else text[0].lower() + text[1:])
    if rng.random() < 0.3:
        text = text.rstrip("?.")
        if rng.random() < 0.08:
            text += ", please"
    case = rng.random()
    return text.lower() if case < 0.28 else text.upper() if case < 0.4 else text


def an(thing: str) -> str:
    """The thing with its indefinite article."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def plural(noun: str) -> str:
    irregular = {"fish": "fish", "person": "people"}
    return irregular.get(noun) or (f"{noun}es" if noun.endswith(("s", "h", "x")) else f"{noun}s")


def join(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
