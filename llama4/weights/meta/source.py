"""The files of Meta's ranks as one source; where routed experts are FP8, their scales are in `fp8_scales_N.pt`."""

from __future__ import annotations

import codecs
import io
import math
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.families.names import EMBEDDING
from llama4.progress import track
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import TensorSpec
from llama4.reading import check_zip
from llama4.weights import memory
from llama4.weights.meta.names import Piece, pieces
from llama4.weights.meta.params import PARAMS_FILE, RANK_FILES
from llama4.weights.source import Origin
from llama4.weights.stamps import STAMP, check_stamps

RANK_FILE = "consolidated.{:02d}.pth"
SCALES_FILE = "fp8_scales_{}.pt"
_RANK_NAME = re.compile(r"consolidated\.(\d\d)\.pth")
STAMP_RECORD = f".data/{STAMP}"
"""In the archive that a file is."""
NAME_RECORD = ".data/llama4_name"
"""The name under which a rank was written, without its ending, there, too."""
_DROPPED = re.compile(r"(text_model\.)?rope\.freqs|freqs?_cis|.*_extra_state|.*gate_stats_3E|.*expert_activation_DE")
"""Keys that hold no weights of the model: tables, states of training and its statistics."""


class MetaSource:
    """The ranks' files, memory-mapped, as the model's tensors, put together one at a time. Scales of FP8 experts are
    `gate_up_proj_scale` [E, 1, 2F] and `down_proj_scale` [E, D, ranks]: each rank has rounded its own inputs of
    down_proj.

    Raises:
        CheckpointError: no ranks, one is missing, damaged, quantized otherwise, or holds other keys than the others.
    """

    def __init__(self, directory: str | Path, config: Llama4Config) -> None:
        self.plan: QuantizationPlan = {}
        self.notes: Sequence[str] = ()
        files = _rank_files(Path(directory))
        check_order(files)
        stamps = {path.name: _record(path, STAMP_RECORD) for path in files}
        check_stamps(Path(directory), stamps, next(iter(stamps.values())))
        self._ranks = [_read(path) for path in files]
        self._table = pieces(config, {key: tuple(tensor.shape) for key, tensor in self._ranks[0].items()})
        self._scales = _read_scales(Path(directory), self._ranks, self._table)
        first = self._ranks[0]
        for i, rank in enumerate(self._ranks):
            if first.keys() != rank.keys():
                raise CheckpointError(
                    f"{RANK_FILE.format(i)} in {directory} holds other keys than {RANK_FILE.format(0)}; all files must "
                    "be of one model: fetch them again",
                    sorted(first.keys() - rank.keys()),
                    sorted(rank.keys() - first.keys()),
                )
        used = {piece.key for parts in self._table.values() for piece in parts}
        self._unknown = sorted(first.keys() - used)
        self._check_count(Path(directory), config)

    @property
    def is_quantized(self) -> bool:
        return bool(self._scales)

    def _check_count(self, directory: Path, config: Llama4Config) -> None:
        """Raises:
        CheckpointError: the embeddings are as large as with some times as many ranks, or a part of them.
        """
        parts = self._table.get(EMBEDDING, ())
        if not parts or not all(piece.key in self._ranks[0] for piece in parts):
            return  # whoever reads them says so
        count = math.prod(self.spec(EMBEDDING).shape)
        wanted = config.text.num_embeddings * config.text.hidden_size
        if 0 < count != wanted and 0 in (wanted % count, count % wanted):
            raise CheckpointError(
                f"{directory} has {len(self._ranks)} files with {count:,} numbers of embeddings, of which "
                f"{PARAMS_FILE} says {wanted:,}; put all files of one model there, from {RANK_FILE.format(0)} on"
            )

    def names(self) -> Collection[str]:
        """Parameters of which all pieces are there, scales, and Meta's names of what the model has no place for."""
        first = self._ranks[0]
        complete = (name for name, parts in self._table.items() if all(piece.key in first for piece in parts))
        return [*complete, *self._scales, *self._unknown]

    def spec(self, name: str) -> TensorSpec:
        if name in self._scales:
            return TensorSpec(tuple(self._scales[name].shape), self._scales[name].dtype)
        if name not in self._table:
            return TensorSpec(tuple(self._ranks[0][name].shape), self._ranks[0][name].dtype)
        widths, shape = 0, list[int]()
        for piece in self._table[name]:
            parts = self._parts(name, piece)
            shape = list(parts[0].shape)
            if piece.join is not None:
                shape[piece.join] = sum(part.shape[piece.join] for part in parts)
            widths += shape[-1]
        return TensorSpec((*shape[:-1], widths), self._ranks[0][self._table[name][0].key].dtype)

    def read(self, name: str) -> Tensor:
        """A view of the file where one rank has all of it, else a copy."""
        if name in self._scales:
            return self._scales[name]
        if self.is_mapped(name):
            return self._parts(name, self._table[name][0])[0]
        whole = memory.empty(*self.spec(name))
        begin, pieces_of_it = 0, self._table[name]
        for piece in track(pieces_of_it):
            width = whole.shape[-1] // len(pieces_of_it)
            target = whole.narrow(-1, begin, width) if len(pieces_of_it) > 1 else whole
            begin += width
            at = 0
            for part in track(self._parts(name, piece)):
                join = piece.join or 0
                target.narrow(join, at, part.shape[join]).copy_(part)
                at += part.shape[join]
        return whole

    def is_mapped(self, name: str) -> bool:
        parts = self._table.get(name, ())
        return len(parts) == 1 and (parts[0].join is None or len(self._ranks) == 1)

    def origin(self, name: str) -> Origin:
        """Of a tensor that ranks share, all its keys, and the first rank's file."""
        keys = ", ".join(piece.key for piece in self._table.get(name, ())) or name
        is_there = any(piece.key in self._ranks[0] for piece in self._table.get(name, ())) or name in self._unknown
        return Origin(keys, RANK_FILE.format(0) if is_there else None)

    def _parts(self, name: str, piece: Piece) -> list[Tensor]:
        """The part that each rank has; of a tensor that all ranks have, the first's."""
        ranks = self._ranks if piece.join is not None else self._ranks[:1]
        try:
            return [piece.of(rank[piece.key]) for rank in ranks]
        except RuntimeError as error:
            shape = list(ranks[0][piece.key].shape)
            raise CheckpointError(f"{piece.key} has the shape {shape}, which does not make up {name}") from error


def _rank_files(directory: Path) -> list[Path]:
    found = sorted(path for path in directory.glob(RANK_FILES) if _RANK_NAME.fullmatch(path.name))
    if not found:
        raise CheckpointError(f"{directory} holds params.json but no {RANK_FILE.format(0)}; fetch the weights too")
    names = {path.name for path in found}
    count = int(found[-1].name.split(".")[1]) + 1
    if missing := [name for i in range(count) if (name := RANK_FILE.format(i)) not in names]:
        raise CheckpointError(f"{directory} lacks {len(missing)} of its {count} files; fetch them again", missing)
    return found


def check_order(files: Sequence[Path]) -> None:
    """A file has the name under which it was written.

    Raises:
        CheckpointError: the files have each other's.
    """
    written, found = [_written_as(path) for path in files], [path.stem for path in files]
    if written != found and sorted(written) == sorted(found):
        own = next(i for i, name in enumerate(written) if name != found[i])
        raise CheckpointError(
            f"{files[own]} was written as {written[own]}{files[own].suffix}: the ranks are not in their order; give "
            "the files their own names, or fetch them again"
        )


def _written_as(path: Path) -> str:
    """As we say it in a record, or `torch.save` by the name of the folder that all records are in."""
    if (name := _record(path, NAME_RECORD)) is not None:
        return name
    try:
        with ZipFile(path) as file:
            return file.namelist()[0].partition("/")[0]
    except (BadZipFile, OSError, ValueError, RuntimeError, IndexError):
        return ""  # whoever reads the tensors will say more


def _record(path: Path, ending: str) -> str | None:
    """A short record of our own; None without."""
    check_zip(path)
    try:
        with ZipFile(path) as file:
            records = [name for name in file.namelist() if name.endswith(f"/{ending}")]
            with file.open(records[0]) if records else io.BytesIO() as record:
                return record.read(64).decode("ascii") or None
    except (BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error):
        return None  # whoever reads the tensors will say more


def _read(path: Path) -> dict[str, Tensor]:
    kept = {key: value for key, value in _load(path).items() if not _DROPPED.fullmatch(key)}
    for key, value in kept.items():
        is_fp8_expert = value.dtype == torch.float8_e4m3fn and ".experts." in key
        if not value.is_floating_point() or (value.itemsize == 1 and not is_fp8_expert):
            raise CheckpointError(
                f"{key} in {path} is quantized ({value.dtype}), which this library does not read; use the bf16 "
                "checkpoint, or one with routed experts in float8_e4m3fn"
            )
    return kept


def _load(path: Path) -> dict[str, Tensor]:
    # Released files keep byte buffers beside the weights; these names are all that they need to be read.
    harmless: list[Any] = [io.BytesIO, bytes, codecs.encode]
    check_zip(path)
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch's reader raises whatever a malformed file leads it to
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it would call {called[1]}, and nothing in a file is executed" if called else "it is cut short or damaged"
        )
        raise CheckpointError(f"{path} cannot be read as weights: {reason}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; Meta's files hold tensors by name: fetch it again"
        )
    for key, value in content.items():
        if not isinstance(value, Tensor) and not _DROPPED.fullmatch(str(key)):
            raise CheckpointError(f"{key!r} in {path} is a {type(value).__name__}, no tensor; fetch the file again")
    return {str(key): value for key, value in content.items()}


def _read_scales(
    directory: Path, ranks: list[dict[str, Tensor]], table: Mapping[str, tuple[Piece, ...]]
) -> dict[str, Tensor]:
    """The scales of FP8 experts, put together from all ranks; Meta names them after the parameters of its own model."""
    first = ranks[0]
    quantized = [
        name
        for name, parts in table.items()
        if parts[0].key in first and first[parts[0].key].dtype == torch.float8_e4m3fn
    ]
    if not quantized:
        return {}
    if (directory / SCALES_FILE.replace("fp8", "int4").format(0)).is_file():
        raise CheckpointError(
            f"{directory} holds Meta's int4, which this library does not read; quantize the bf16 checkpoint: "
            "quantization='int4_mixed' is the same choice of weights"
        )
    paths = [directory / SCALES_FILE.format(rank) for rank in range(len(ranks))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f"{directory} holds experts in FP8 but not their scales; fetch those, too", missing)
    check_order(paths)
    files = [_load(path) for path in paths]
    scales: dict[str, Tensor] = {}
    for name in quantized:
        layer = name.removeprefix("language_model.model.").rpartition(".")[0]
        wanted = [f"{layer}.{w}" for w in (("w1", "w3") if name.endswith("gate_up_proj") else ("w2",))]
        if missing := [
            f"{key} ({path.name})" for path, f in zip(paths, files, strict=True) for key in wanted if key not in f
        ]:
            raise CheckpointError(f"{directory} lacks scales of {name}; fetch its files again", missing)
        if len(wanted) == 2:
            whole = torch.cat([file[key].flatten(1) for key in wanted for file in files], dim=1)[:, None]
        else:
            whole = torch.stack([file[wanted[0]].flatten(1) for file in files], dim=-1)
        scales[f"{name}_scale"] = whole
    return scales
