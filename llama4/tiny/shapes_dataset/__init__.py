"""The embedded model's data set: generated pictures of coloured shapes and short texts, with questions and answers."""

from llama4.tiny.shapes_dataset.answers import CORE_KINDS, KINDS_OF_QUESTION, Question, describe, is_right, normalise
from llama4.tiny.shapes_dataset.pictures import COLOURS, KINDS, Ground, Scene, Shape, Text, draw, draw_labels
from llama4.tiny.shapes_dataset.questions import (
    ask,
    ask_follow_up,
    ask_many,
    ask_outside,
    ask_pair,
    ask_without_picture,
    corpus,
    fresh_question,
)
from llama4.tiny.shapes_dataset.scenes import random_scene
from llama4.tiny.shapes_dataset.wordings import NOUNS, plural

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
