"""The chunk rule against a loop over every pair of positions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llama4.config.window import (
    SlidingWindow,
    chunk_end,
    chunk_offset,
    chunk_start,
    ends_chunk,
    held_tokens,
    most_visible_tokens,
    slots_end,
    visible_pairs,
    visible_tokens,
)

CHUNKS = (None, 1, 2, 3, 7, 8)
WINDOWS = (*CHUNKS, *(SlidingWindow(size) for size in (1, 2, 3, 7, 8, 40)))
POSITIONS = range(25)


def sees(query: int, key: int, window: int | None, start: int) -> bool:
    """Meta's mask, for one pair: the same chunk, and not the future; of Mistral `sliding_window_overlay`'s."""
    if isinstance(window, SlidingWindow):
        return start <= key <= query and key > query - window
    same_chunk = window is None or query // window == key // window
    return start <= key <= query and same_chunk


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_a_token_sees_its_chunk_up_to_itself(window: int | None, start: int) -> None:
    for position in POSITIONS[start:]:
        visible = [key for key in POSITIONS if sees(position, key, window, start)]
        assert list(range(chunk_start(position, window, start), position + 1)) == visible
        assert visible_tokens(position, window, start) == len(visible)


@pytest.mark.parametrize("window", CHUNKS)
def test_the_next_chunk_begins_where_a_chunk_ends(window: int | None) -> None:
    for position in POSITIONS:
        end = chunk_end(position, window)
        if end is None:
            assert window is None
        else:
            assert end > position
            assert sees(end - 1, position, window, 0) and not sees(end, position, window, 0)
            assert chunk_start(end, window) == end


@pytest.mark.parametrize("window", CHUNKS)
def test_offsets_count_from_the_first_visible_token_of_an_endless_sequence(window: int | None) -> None:
    offsets = [visible_tokens(position, window) - 1 for position in POSITIONS]
    assert [chunk_offset(position, window) for position in POSITIONS] == offsets
    assert chunk_offset(torch.tensor(POSITIONS), window).tolist() == offsets


@pytest.mark.parametrize("window", WINDOWS)
def test_pairs_are_the_sum_over_tokens(window: int | None) -> None:
    for length in (0, *POSITIONS):
        assert visible_pairs(length, window) == sum(sees(q, k, window, 0) for q in range(length) for k in range(length))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_most_that_a_token_sees(window: int | None) -> None:
    for n in range(1, 25):
        assert most_visible_tokens(n, window) == max(visible_tokens(position, window) for position in range(n))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("start", [0, 5])
def test_slots_are_those_of_tokens_that_are_seen_again(window: int | None, start: int) -> None:
    """A token takes the slot of one that no later token sees, and the first slot where `slots_end` says so."""
    for end in POSITIONS[start:]:
        seen = [key for key in range(start, end) if sees(end, key, window, start)]
        ring = isinstance(window, SlidingWindow) and end - start >= window
        assert held_tokens(end, window, start) == len(seen) + ring
        first = [n for n in range(end + 1, 99) if window is not None and slot(n, window, start) == 0]
        assert slots_end(end, window, start) == (first[0] if first else None)
        is_endless = window is None or isinstance(window, SlidingWindow)
        assert chunk_offset(end, window) == (end if is_endless else end % (window or 1))
        assert not (isinstance(window, SlidingWindow) and ends_chunk(end, window))


def slot(position: int, window: int, start: int) -> int:
    return (position - start if isinstance(window, SlidingWindow) else position) % window


def test_the_rule_stands_in_one_place() -> None:
    root = Path(__file__).parents[2]
    rule = re.compile(r"(%|//) *window\b|\bwindow(\(.*\))? or \w")
    files = {path for folder in ("llama4", "vision") for path in (root / folder).rglob("*.py")}
    found = {path.relative_to(root).as_posix() for path in files if rule.search(path.read_text(encoding="utf-8"))}
    assert found == {"llama4/config/window.py"}
