"""The world of the embedded model: drawings of coloured shapes and short texts, and questions about them."""

from .answers import CORE_KINDS, KINDS_OF_QUESTION, Question, describe, is_right, normalise
from .pictures import COLOURS, KINDS, Ground, Scene, Shape, Text, draw, draw_labels
from .questions import (
    ask,
    ask_follow_up,
    ask_many,
    ask_outside,
    ask_pair,
    ask_without_picture,
    corpus,
    fresh_question,
)
from .scenes import random_scene
from .wordings import NOUNS, plural

__all__ = [
    "COLOURS",
    "CORE_KINDS",
    "KINDS",
    "KINDS_OF_QUESTION",
    "NOUNS",
    "Ground",
    "Question",
    "Scene",
    "Shape",
    "Text",
    "ask",
    "ask_follow_up",
    "ask_many",
    "ask_outside",
    "ask_pair",
    "ask_without_picture",
    "corpus",
    "describe",
    "draw",
    "draw_labels",
    "fresh_question",
    "is_right",
    "normalise",
    "plural",
    "random_scene",
]
