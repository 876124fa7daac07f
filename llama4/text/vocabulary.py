"""What a tokenizer.model does not say of a vocabulary: the pattern that splits text, and the special tokens.

`LLAMA4` is that of Llama 4, `LLAMA3` that of Llama 3 to 3.3, and `SENTENCEPIECE` that of Llama 1, Llama 2 and Code
Llama, whose file says all but what the tokens are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True)
class Vocabulary:
    """Pattern and special tokens.

    Attributes:
        pattern: the regular expression that splits a text into pieces; bytes are merged inside a piece only.
        special_token_names: count -> the names of the first `count` special tokens in order of id. Their ids follow the
            highest rank.
        num_special_tokens: how many of them a released tokenizer has.
        bos, eos, pad: names of the first token of a prompt, of the last token of a message, and of padding.
        stop: names of the tokens that end a reply.
        image: name of the token whose embeddings are replaced by image features; None if there is none.
    """

    pattern: str
    special_token_names: Callable[[int], list[str]]
    num_special_tokens: int
    bos: str
    eos: str
    pad: str
    stop: tuple[str, ...]
    image: str | None = None

    @cached_property
    def control_names(self) -> frozenset[str]:
        """The special tokens that have a meaning; no text becomes one of them, whatever a file says."""
        return frozenset(name for name in self.special_token_names(self.num_special_tokens) if "reserved" not in name)


PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is split before byte pairs are merged: the pattern of o200k."""

TEKKEN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
"""The same of Mistral's Tekken."""

NUM_SPECIAL_TOKENS = 2048

_NAMES = {
    "text_post_train": (
        "<|header_start|> <|header_end|> <|eom|> <|eot|> <|step|> {6} <|python_start|> <|python_end|> "
        "<|finetune_right_pad|> {~2} {61}"
    ),
    "vision": (
        "<|image_start|> <|image_end|> {2} <|tile_x_separator|> <|tile_y_separator|> {4} <|image|> {1} <|patch|> {1041}"
    ),
    "reasoning": "{8} <|reasoning_thinking_start|> <|reasoning_thinking_end|>",
}
"""Special tokens by group, in order of id. {n}: n reserved names, numbered through the group; {~n}: skip n numbers."""


def special_token_names(count: int = NUM_SPECIAL_TOKENS) -> list[str]:
    """The first `count` of the special tokens of Llama 4, in order of id."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    for group, layout in _NAMES.items():
        number = 0
        for word in layout.split():
            if word.startswith("{~"):
                number += int(word[2:-1])
            elif word.startswith("{"):
                end = number + int(word[1:-1])
                names += [f"<|{group}_reserved_special_token_{i}|>" for i in range(number, end)]
                number = end
            else:
                names.append(word)
    names += [f"<|reserved_special_token_{i}|>" for i in range(count - len(names))]
    return names[:count]


LLAMA4 = Vocabulary(
    PATTERN,
    special_token_names,
    NUM_SPECIAL_TOKENS,
    bos="<|begin_of_text|>",
    eos="<|eot|>",
    pad="<|finetune_right_pad|>",
    stop=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
    image="<|patch|>",
)

_LLAMA3_NAMES = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
"""Source: llama_models/llama3/tokenizer.py. What has no name yet in the first files (`<|eom_id|>` and others) is as in
those of 3.3."""


def llama3_token_names(count: int = 256) -> list[str]:
    """The first `count` of the special tokens of Llama 3, in order of id."""
    rest = range(2, 2 + max(0, count - len(_LLAMA3_NAMES)))
    return [*_LLAMA3_NAMES, *(f"<|reserved_special_token_{i}|>" for i in rest)][:count]


LLAMA3_RANKS = 128000
"""Of its tokenizer.model."""

LLAMA3 = Vocabulary(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    llama3_token_names,
    256,
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    stop=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
)

LLAMA32_VISION = replace(
    LLAMA3,
    special_token_names=lambda count: [*llama3_token_names(257)[:11], *llama3_token_names(257)[12:], "<|image|>"][
        :count
    ],
    num_special_tokens=257,
    image="<|image|>",
)
"""Llama 3's file, but that `<|image|>` has the first id behind the vocabulary. Source: transformers'
convert_mllama_weights_to_hf.py."""


class Infilling(NamedTuple):
    """Tokens before what stands in front of a gap, what follows it and what fills it, and at the end of that."""

    prefix: str
    suffix: str
    middle: str
    end: str


INFILLING = Infilling("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>")
"""Code Llama's."""

SENTENCEPIECE = Vocabulary(
    "",
    lambda count: ["<unk>", "<s>", "</s>", *INFILLING][:count],
    3 + len(INFILLING),
    bos="<s>",
    eos="</s>",
    pad="<unk>",
    stop=("</s>", INFILLING.end),
)
