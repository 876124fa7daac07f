"""safetensors files: the container of checkpoints in Hugging Face's layout. Names here are the files' keys."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama4.errors import CheckpointError, ConfigError, Llama4Error
from llama4.files import replaced_file, write_pieces
from llama4.progress import PIECE, Bar, track
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import TensorSpec
from llama4.reading import MAX_INDEX_BYTES, check_safetensors, read_json
from llama4.weights.source import Origin, Source, Tensors
from llama4.weights.stamps import STAMP, check_stamps

SINGLE_FILE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Header(NamedTuple):
    """What a file says of its content.

    Attributes:
        tensors: key -> dtype, in the format's word, and shape.
        stamp: of those who wrote it, see `stamps`.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    stamp: str | None = None


class Shards(Protocol):
    """The safetensors files of a checkpoint, wherever they are."""

    def __contains__(self, file: str) -> bool: ...

    def headers(self, files: Collection[str]) -> Iterable[Header]:
        """Of each file, in order.

        Raises:
            CheckpointError: a file that is cut short, or no safetensors file.
        """

    def path(self, file: str) -> Path:
        """A file on this machine. That of the file before it may be gone then."""


class LocalShards:
    """In a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __contains__(self, file: str) -> bool:
        return (self._directory / file).is_file()

    def headers(self, files: Collection[str]) -> Iterator[Header]:
        for path in map(self.path, files):
            content = _open(path)
            slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118 (it has no other way)
            tensors = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
            yield Header(tensors, (content.metadata() or {}).get(STAMP))

    def path(self, file: str) -> Path:
        return self._directory / file


def _open(path: Path) -> Any:
    try:
        check_safetensors(path)
        return safe_open(path, framework="pt")
    except Llama4Error as error:
        raise CheckpointError(str(error)) from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}); fetch it again") from error


class _Map:
    """The memory map of a file. Of its tensors nothing is read yet, while the package's own `get_tensor` reads a page,
    and with it what the system reads ahead: megabytes of each."""

    def __init__(self, path: Path) -> None:
        _open(path)  # refuses what is damaged
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(length))
        self._begin = 8 + length
        self._storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def tensor(self, key: str) -> Tensor:
        entry = self._header[key]
        begin, end = (self._begin + offset for offset in entry["data_offsets"])
        content = torch.empty(0, dtype=torch.uint8).set_(self._storage[begin:end])
        return content.view(_DTYPES[entry["dtype"]]).view(entry["shape"])


class SafetensorsFiles:
    """One or more safetensors files, memory-mapped: a tensor's bytes are read when they are used, and a file is mapped
    only while its tensors are, so that a checkpoint may be larger than the memory a process may have.

    Args:
        directory: where they are, or would be.
        files: file -> keys that it must hold; None for all that it has.
        shards: the files; by default those in `directory`.
        stamp: what the index says all of them have; None if it says nothing.

    Raises:
        CheckpointError: a file that is missing, cut short or no safetensors file, or that lacks a key the index
            promises; or files that were not written together.
    """

    def __init__(
        self,
        directory: Path,
        files: Mapping[str, set[str] | None],
        shards: Shards | None = None,
        stamp: str | None = None,
    ) -> None:
        self._shards = shards if shards is not None else LocalShards(directory)
        if missing := sorted(file for file in files if file not in self._shards):
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of its {len(files)} shards; fetch them again", missing
            )
        self.plan: QuantizationPlan = {}
        self._files: dict[str, str] = {}
        self.notes: Sequence[str] = ()
        self._specs: dict[str, TensorSpec] = {}
        self._opened: tuple[str, _Map | None] = ("", None)
        headers = dict(zip(files, self._shards.headers(files), strict=True))
        stamps = {file: header.stamp for file, header in headers.items()}
        check_stamps(directory, stamps, stamp, f"; if this is meant, remove {STAMP} from {INDEX_FILE}")
        places = {key: file for file, promised in files.items() for key in promised or ()}
        for file, promised in files.items():
            path, header = directory / file, headers[file].tensors
            if promised is not None and promised - header.keys():
                missing = sorted(promised - header.keys())
                raise CheckpointError(f"{path} lacks keys that {INDEX_FILE} places in it", missing)
            for key in sorted(header):
                if places.get(key, file) != file:  # the index says whose counts
                    continue
                dtype, shape = header[key]
                if dtype not in _DTYPES:
                    raise CheckpointError(f"{path} holds {key} in {dtype}, which this library does not read")
                self._files[key] = file
                self._specs[key] = TensorSpec(shape, _DTYPES[dtype])

    def names(self) -> Collection[str]:
        return self._files.keys()

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        if self._opened[0] != file:
            self._opened = ("", None)  # before the next file comes, the map of the last is gone
            self._opened = (file, _Map(self._shards.path(file)))
        assert self._opened[1] is not None
        return self._opened[1].tensor(name)

    def is_mapped(self, name: str) -> bool:
        return True

    def origin(self, name: str) -> Origin:
        return Origin(name, self._files.get(name))


def open_safetensors(directory: str | Path, shards: Shards | None = None) -> SafetensorsFiles:
    """The weights in a directory of Hugging Face's layout: one `model.safetensors`, or an index and its shards.

    Args:
        directory: with the index, if there is one.
        shards: the files; by default those in the directory.

    Raises:
        CheckpointError: no weights, or weights that are damaged or incomplete.
    """
    directory = Path(directory)
    index = directory / INDEX_FILE
    if not index.is_file():
        if SINGLE_FILE not in (shards if shards is not None else LocalShards(directory)):
            if found := sorted(directory.glob(SHARDS)):
                raise CheckpointError(f"{directory} holds {found[0].name}, but no {INDEX_FILE}; fetch it, too")
            raise CheckpointError(f"{directory} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        return SafetensorsFiles(directory, {SINGLE_FILE: None}, shards)
    try:
        content = read_json(index, MAX_INDEX_BYTES)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    places, about = content.get("weight_map"), content.get("metadata")
    stamp = about.get(STAMP) if isinstance(about, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} is no index of shards: its weight_map names no files; fetch it again")
    files: dict[str, set[str]] = {name: set() for name in sorted(set(places.values()))}
    for key, name in places.items():
        files[name].add(key)
    if outside := [name for name in files if name in ("", ".", "..") or Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its directory, which are not opened", outside)
    return SafetensorsFiles(directory, dict(files), shards, stamp)


def stamp_of(path: Path) -> str | None:
    """The stamp of one file; None if it has none, or is no safetensors file."""
    try:
        return next(LocalShards(path.parent).headers([path.name])).stamp
    except CheckpointError:
        return None


def write_safetensors(
    files: Source, directory: Path, max_shard_bytes: int, stamp: str, *, progress: bool = False
) -> None:
    """Write tensors under their names, in shards of at most so many bytes and an index if one file is not enough.

    They are in the order of the files that they come from, so that each of these is read once. Shards that are there
    already are of a run that was interrupted, and are left. One tensor at a time is in memory. The stamp
    is that of all shards; a file alone has none.
    """
    keys = sorted(files.names(), key=lambda key: files.origin(key).file or "")
    sizes = {key: files.spec(key).nbytes for key in keys}
    shards = list(_shards(sizes, max_shard_bytes))
    places: dict[str, str] = {}
    with Bar("writing", sum(sizes.values()), "bytes", shown=progress) as bar:
        for i, shard in enumerate(shards):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            places |= dict.fromkeys(shard, name)
            if (directory / name).exists():
                bar.advance(sum(sizes[key] for key in shard))
                continue
            _save_shard(files, shard, directory / name, stamp if len(shards) > 1 else None, bar)
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values()), STAMP: stamp}, "weight_map": places}
        (directory / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], stamp: str | None = None) -> None:
    """Write one file, see `replaced_file`.

    Raises:
        DiskError: it cannot be written; `path` is as it was.
    """
    _save_shard(Tensors(tensors), list(tensors), path, stamp, Bar("writing", shown=False))


def _shards(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Keys, cut into runs of at most `max_bytes` or of a single tensor."""
    shard, used = list[str](), 0
    for key, size in sizes.items():
        if shard and used + size > max_bytes:
            yield shard
            shard, used = [], 0
        shard.append(key)
        used += size
    yield shard


def _save_shard(files: Source, keys: Sequence[str], path: Path, stamp: str | None, bar: Bar) -> None:
    """Write a file, tensor after tensor in the order in which they are read; each to its place, which the header says
    before. Places are in the order of the package's own writer: by size of the dtype, so that all are aligned.
    """
    specs = {key: files.spec(key) for key in keys}
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | ({STAMP: stamp} if stamp is not None else {})}
    places: dict[str, int] = {}
    end = 0
    for key, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        places[key], end = end, end + spec.nbytes
        header[key] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [places[key], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replaced_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, spec in specs.items():
            with bar.step(spec.nbytes):
                tensor = files.read(key)
                assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), key
                file.seek(8 + len(text) + places[key])
                for part in track(_parts(tensor)):
                    write_pieces(file, part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.truncate(8 + len(text) + end)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor as rows of at most a piece each, if it is not one block of memory: its copy is then a piece."""
    if tensor.is_contiguous() or not tensor.shape[0]:
        return [tensor]
    rows = max(1, PIECE * tensor.shape[0] // tensor.nbytes)
    return tensor.split(rows)
