"""What a family's vocabulary has beside the ranks in its tokenizer.model: a pattern and special tokens.

Another family's vocabulary is another `Vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Attributes:
    pattern: the regular expression that cuts a text into the pieces inside which bytes are merged.
    special_token_names: count -> the names of so many special tokens, in order of id; the first id follows the last
        rank.
    num_special_tokens: how many of them a released tokenizer has.
    bos, eos, pad: names of the first token of a prompt, of the last of a message, and of padding.
    stop: names of the tokens that end a reply.
    """

    pattern: str
    special_token_names: Callable[[int], list[str]]
    num_special_tokens: int
    bos: str
    eos: str
    pad: str
    stop: tuple[str, ...]


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
"""How text is cut before byte pairs are merged, as o200k does it."""

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
)
