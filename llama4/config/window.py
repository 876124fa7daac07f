"""Windows of attention, the rules: which earlier tokens a token sees.

A layer with a window cuts a sequence into chunks of `window` positions, [0, window), [window, 2 * window) and so on. A
token sees the tokens of its own chunk up to and including itself, and nothing of the chunks before. A window of None
means one endless chunk: a token sees every token before it. Chunks are counted from position 0, not from the sequence's
first token: of a sequence that starts at position 5, the first chunk is only shorter.

A `SlidingWindow` moves with the token, which sees itself and the `window - 1` tokens before it.

Source: Meta's `create_chunked_attention_mask` (llama_models/llama4/model.py) and transformers' `chunked_overlay`
(masking_utils.py): query q and key k see each other if q // window == k // window and k <= q. Of sliding windows
`sliding_window_overlay` there: k > q - window and k <= q.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Position = TypeVar("Position", int, "Tensor")


class SlidingWindow(int):
    """A window that moves with every token, of so many tokens. Its keys lie in a ring: the token at place n of its
    sequence takes the slot n % window, and the place of one that no token will see again."""


def chunk_start(position: int, window: int | None, start: int = 0) -> int:
    """The first position that a token at `position` sees, in a sequence whose first token is at `start`."""
    if window is None:
        return start
    return max(start, position - (window - 1 if isinstance(window, SlidingWindow) else position % window))


def chunk_end(position: int, window: int | None) -> int | None:
    """The first position after the chunk that `position` is in; None if that chunk has no end."""
    return None if window is None or isinstance(window, SlidingWindow) else position - position % window + window


def slot_of(position: int, window: int | None, start: int = 0) -> int:
    """Where the keys of the token at `position` go in a layer's cache."""
    if isinstance(window, SlidingWindow):
        return (position - start) % window
    return position - chunk_start(position, window, start)


def slots_end(position: int, window: int | None, start: int = 0) -> int | None:
    """The first position after `position` whose keys go to the first slot of a layer's cache: it begins a chunk, or
    another round of a ring. None if all keys have slots of their own."""
    if window is None:
        return None
    return position - (position - (start if isinstance(window, SlidingWindow) else 0)) % window + window


def held_tokens(end: int, window: int | None, start: int = 0) -> int:
    """How many tokens of a sequence from `start` to `end` a layer keeps: those that the next token sees, and of a ring
    the one whose place it takes."""
    return min(end - start, window) if isinstance(window, SlidingWindow) else end - chunk_start(end, window, start)


def ends_chunk(num_tokens: int, window: int | None) -> bool:
    """Whether a sequence of so many tokens, counted from position 0, ends with a chunk."""
    return window is not None and not isinstance(window, SlidingWindow) and num_tokens % window == 0


def chunk_offset(position: Position, window: int | None) -> Position:
    """Where in its chunk a position is, counted from 0; an integer or a tensor of them."""
    return position if window is None or isinstance(window, SlidingWindow) else position % window


def visible_tokens(position: int, window: int | None, start: int = 0) -> int:
    """How many tokens a token at `position` sees, itself included, in a sequence whose first token is at `start`.

    This is also how many keys a layer must keep once that token is in its cache.
    """
    return position + 1 - chunk_start(position, window, start)


def most_visible_tokens(num_tokens: int, window: int | None) -> int:
    """The largest of `visible_tokens` over the first `num_tokens` positions of a sequence."""
    return num_tokens if window is None else min(num_tokens, window)


def visible_pairs(num_tokens: int, window: int | None) -> int:
    """`visible_tokens` summed over the first `num_tokens` positions of a sequence: the scores that attention computes
    for each head."""
    window = window or max(num_tokens, 1)
    if isinstance(window, SlidingWindow):
        begun = min(num_tokens, window)
        return begun * (begun + 1) // 2 + (num_tokens - begun) * window
    chunks, rest = divmod(num_tokens, window)
    return chunks * (window * (window + 1) // 2) + rest * (rest + 1) // 2
