"""Lazy containers of tensors: what is in a checkpoint can be asked without reading it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.quantization.schemes import Plan
from llama4.weights.names import Names, table_for

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Source(Protocol):
    """Named tensors, read when they are asked for; `names` says which parameters of the model they are, and `plan`
    which of its matrices are stored in few bits."""

    @property
    def names(self) -> Names: ...

    @property
    def plan(self) -> Plan: ...

    def keys(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def tensor(self, key: str) -> Tensor: ...


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsSource:
    """One or more safetensors files, memory-mapped: a tensor's bytes are read when they are used, and a file is mapped
    only while its tensors are, so that a checkpoint may be larger than the memory a process may have.

    Args:
        files: file -> keys that it must hold; None for all that it has.

    Raises:
        CheckpointError: a file that is missing, cut short or no safetensors file, or that lacks a key the index
            promises.
    """

    def __init__(self, files: dict[Path, set[str] | None]) -> None:
        if missing := sorted(path.name for path in files if not path.is_file()):
            folder = next(iter(files)).parent
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of its {len(files)} shards; fetch them again", missing
            )
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._open = lru_cache(maxsize=1)(partial(safe_open, framework="pt"))
        for path, promised in files.items():
            try:
                handle = self._open(path)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is cut short or damaged ({error}); fetch it again") from error
            held = set(handle.keys())
            if promised is not None and promised - held:
                raise CheckpointError(f"{path} lacks keys that {INDEX_FILE} places in it", sorted(promised - held))
            for key in sorted(held):
                header = handle.get_slice(key)
                if (dtype := header.get_dtype()) not in _DTYPES:
                    raise CheckpointError(f"{path} holds {key} in {dtype}, which this library does not read")
                self._files[key] = path
                self._shapes[key], self._dtypes[key] = tuple(header.get_shape()), _DTYPES[dtype]
        self.names = table_for(self._files)
        self.plan: Plan = {}

    def keys(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._dtypes[key]

    def tensor(self, key: str) -> Tensor:
        tensor: Tensor = self._open(self._files[key]).get_tensor(key)
        return tensor

    def is_map(self, key: str) -> bool:
        """Whether a tensor is a part of a file's memory map."""
        return key in self._files


def open_source(directory: str | Path) -> SafetensorsSource:
    """The weights in a directory of Hugging Face's layout: one `model.safetensors`, or an index and its shards.

    Raises:
        CheckpointError: no weights, or weights that are damaged or incomplete.
    """
    directory = Path(directory)
    index = directory / INDEX_FILE
    if not index.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise CheckpointError(f"{directory} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        return SafetensorsSource({directory / SINGLE_FILE: None})
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str] | None] = {directory / name: set() for name in sorted(set(places.values()))}
        for key, name in places.items():
            keys = files[directory / name]
            assert keys is not None
            keys.add(key)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}); fetch it again") from error
    if outside := sorted(path.name for path in files if path.parent != directory or ".." in path.parts):
        raise CheckpointError(f"{index} names files outside its directory, which are not opened", outside)
    return SafetensorsSource(files)
