"""Model -> the files of Meta's ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.families.names import HEAD
from llama4.weights.meta.names import pieces
from llama4.weights.meta.source import RANK_FILE
from llama4.weights.source import Source


def write_ranks(
    source: Source, config: Llama4Config, directory: Path, ranks: int = 1, *, progress: bool = False
) -> None:
    """Write `consolidated.NN.pth` for each of `ranks`; one rank's share of the model is in memory at a time.

    Raises:
        CheckpointError: a dimension that does not divide by the number of ranks, each named.
    """
    table = pieces(config)
    tied = {HEAD: "language_model.model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}
    assert {*source.names(), *tied} >= table.keys(), "match the source with its configuration first"
    _check_ranks(config, ranks)
    parts: dict[str, list[tuple[tuple[int, int, int], str, int]]] = {}  # Meta's key -> what makes it up, in order
    for name, its_pieces in table.items():
        for at, piece in enumerate(its_pieces):
            parts.setdefault(piece.key, []).append((piece.share, name, at))
    bar = tqdm(total=ranks * len(parts), desc="writing", unit="tensor", disable=None if progress else True, leave=False)
    with bar:
        for rank in range(ranks):
            state = {}
            for key, owners in parts.items():
                slices = []
                for _, name, at in sorted(owners):
                    parameter = source.read(tied.get(name, name)).chunk(len(table[name]), dim=-1)[at]
                    slices.append(table[name][at].slice(parameter, rank, ranks))
                state[key] = (
                    torch.cat(slices) if len(slices) > 1 else slices[0].clone(memory_format=torch.contiguous_format)
                )
                bar.update()
            with _named(directory / RANK_FILE.format(rank)) as path:
                torch.save(state, path)


def _check_ranks(config: Llama4Config, ranks: int) -> None:
    text, vision = config.text, config.vision
    sizes = {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
    }
    if text.moe_layers:
        sizes["intermediate_size"] = text.intermediate_size
    if len(text.moe_layers or ()) < text.num_hidden_layers:
        sizes["intermediate_size_mlp"] = text.intermediate_size_mlp
    if vision is not None:
        sizes |= {
            "vision num_attention_heads": vision.num_attention_heads,
            "vision intermediate_size": vision.intermediate_size,
            "vision_output_dim": vision.vision_output_dim,
            "hidden_size": text.hidden_size,
        }
    if ranks < 1:
        raise CheckpointError(f"ranks is {ranks}; choose at least 1")
    if odd := [f"{name} = {size}" for name, size in sizes.items() if size % ranks]:
        raise CheckpointError(f"{ranks} ranks do not divide {', '.join(odd)}; choose another number")


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """torch reports a full disk as a RuntimeError; make it the system's own."""
    try:
        yield path
    except RuntimeError as error:
        raise OSError(f"{path.name}: {error}") from error
