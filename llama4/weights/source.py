"""Lazy containers of tensors: what is in a checkpoint can be asked without reading it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.quantization.schemes import Plan
from llama4.weights.rules import Names, table_for

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


class SafetensorsSource:
    """One or more safetensors files, memory-mapped: a tensor's bytes are read when they are used.

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
        self._files = {}
        self._shapes = {}
        for path, promised in files.items():
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is cut short or damaged ({error}); fetch it again") from error
            held = set(handle.keys())
            if promised is not None and promised - held:
                raise CheckpointError(f"{path} lacks keys that {INDEX_FILE} places in it", sorted(promised - held))
            for key in sorted(held):
                self._files[key] = handle
                self._shapes[key] = tuple(handle.get_slice(key).get_shape())
        self.names = table_for(self._files)
        self.plan: Plan = {}

    def keys(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return self.tensor(key).dtype  # nothing but the header is read for it

    def tensor(self, key: str) -> Tensor:
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor


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
