"""Model -> the files of Meta's ranks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias, cast
from zipfile import ZipFile

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.families.names import EMBEDDING, HEAD
from llama4.files import write_pieces
from llama4.progress import Bar
from llama4.weights.meta.names import pieces
from llama4.weights.meta.source import NAME_RECORD, RANK_FILE, STAMP_RECORD
from llama4.weights.source import Source

_Owner: TypeAlias = tuple[tuple[int, int, int], str, int]
"""Which rows of a tensor of Meta's (`Piece.share`) are a parameter's, its name, and which of its pieces they are."""


def write_ranks(
    source: Source,
    config: Llama4Config,
    directory: Path,
    ranks: int = 1,
    stamp: str | None = None,
    *,
    progress: bool = False,
) -> None:
    """Write `consolidated.NN.pth` for each of `ranks`; one rank's share of the model is in memory at a time.
    Several have their names and the stamp, in records that `torch.load` does not look at.

    Raises:
        CheckpointError: a dimension that does not divide by the number of ranks, each named.
    """
    table = pieces(config)
    tied = {HEAD: EMBEDDING} if config.text.tie_word_embeddings else {}
    assert {*source.names(), *tied} >= table.keys(), "match the source with its configuration first"
    _check_ranks(config, ranks)
    parts: dict[str, list[_Owner]] = {}  # Meta's key -> what makes it up
    for name, its_pieces in table.items():
        for at, piece in enumerate(its_pieces):
            parts.setdefault(piece.key, []).append((piece.share, name, at))

    def share(owners: list[_Owner], rank: int) -> Tensor:
        slices = []
        for _, name, at in sorted(owners):
            parameter = source.read(tied.get(name, name)).chunk(len(table[name]), dim=-1)[at]
            slices.append(table[name][at].slice(parameter, rank, ranks))
        return torch.cat(slices) if len(slices) > 1 else slices[0].clone(memory_format=torch.contiguous_format)

    total = sum(source.spec(tied.get(name, name)).nbytes for name in table)
    with Bar("reading and writing", 2 * total, "bytes", shown=progress) as bar:
        for rank in range(ranks):
            state = {}
            for key, owners in parts.items():
                size = sum(source.spec(tied.get(name, name)).nbytes // len(table[name]) for _, name, _ in owners)
                with bar.step(size / ranks):
                    state[key] = share(owners, rank)
            path = directory / RANK_FILE.format(rank)
            with path.open("wb") as file, _own_errors():
                torch.save(state, cast(IO[bytes], _Pieces(file, bar)))
            if ranks > 1:
                _add_records(path, {NAME_RECORD: path.stem} | ({} if stamp is None else {STAMP_RECORD: stamp}))


def _add_records(path: Path, records: dict[str, str]) -> None:
    with ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        for record, content in records.items():
            archive.writestr(f"{folder}/{record}", content)


class _Pieces(io.RawIOBase):
    """A file for `torch.save`, which gives it a tensor at a time."""

    def __init__(self, file: BinaryIO, bar: Bar) -> None:
        self._file, self._bar = file, bar

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        with self._bar.step(len(data)):
            write_pieces(self._file, data)
        return len(data)


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
def _own_errors() -> Iterator[None]:
    """After what goes wrong in `_Pieces`, Ctrl-C or a full disk, torch fails to close its archive, and says that."""
    try:
        yield
    except RuntimeError as error:
        raise error.__context__ or error from None
