"""The files of a GGUF model: one, or a split of several, and the file with the vision tower beside them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from torch import Tensor

from llama4.errors import CheckpointError
from llama4.gguf import GgufFile, GgufTensor
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.weight import TensorSpec
from llama4.weights.source import Origin

SUFFIX = ".gguf"
WITH_VISION = ("llama4",)
"""Architectures whose models may have a vision tower here."""
_VISION = "clip"
"""The architecture of a file with a vision tower."""
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MMPROJ = re.compile(r"(.*[-_.])?mmproj([-_.].*)?\.gguf", re.IGNORECASE)
_MMPROJ_ORDER = ("bf16", "f16", "f32")
"""Of several files with the vision tower, the first whose name has this is taken."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are torch's own dtypes."""


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return Path(path).suffix.lower() == SUFFIX


def is_mmproj(name: str) -> bool:
    """Whether a file is one with a vision tower, by its name."""
    return _MMPROJ.fullmatch(PurePath(name).name) is not None


def models(names: Iterable[str]) -> list[str]:
    """Of names of files those of GGUF models, of a split the first."""
    found = []
    for name in sorted(names):
        split = _SPLIT.fullmatch(name)
        if is_gguf(name) and not is_mmproj(name) and (split is None or int(split["index"]) == 1):
            found.append(name)
    return found


def parts(name: str) -> list[str]:
    """All files of the split that a file is part of, in order; of no split the file alone."""
    split = _SPLIT.fullmatch(name)
    if split is None:
        return [name]
    return [f"{split['stem']}-{i:05d}-of-{split['count']}{SUFFIX}" for i in range(1, int(split["count"]) + 1)]


def mmproj_of(model: str, names: Iterable[str]) -> str | None:
    """Of the names of files beside a model's, that of its vision tower: the one with its own name, if there is one."""
    own = f"mmproj-{PurePath(model).name}"
    found = sorted(filter(is_mmproj, names), key=lambda name: (name != own, _rank(name), name))
    return found[0] if found else None


def _rank(name: str) -> int:
    return next((i for i, kind in enumerate(_MMPROJ_ORDER) if kind in name.lower()), len(_MMPROJ_ORDER))


@dataclass(frozen=True)
class GgufModel:
    """The heads of a model's files.

    Attributes:
        files: of a split all, the first of which has the metadata.
        mmproj: that of the vision tower, if there is one.
    """

    files: Sequence[GgufFile]
    mmproj: GgufFile | None = None

    @classmethod
    def read(cls, path: Path, mmproj: Path | None = None) -> GgufModel:
        """Read the heads.

        Args:
            path: of the file, or of any of a split.
            mmproj: of the file with the vision tower; by default the one beside it, if any, where the model may have
                one.

        Raises:
            CheckpointError: files that are missing or damaged, or no model.
        """
        names = parts(path.name)
        there = {each.name for each in path.parent.iterdir()} if len(names) > 1 else {path.name}
        if missing := [name for name in names if name not in there or not path.with_name(name).is_file()]:
            raise CheckpointError(f"{path} is one of {len(names)} files; fetch the others, too", missing)
        files = [GgufFile.read(path.with_name(name)) for name in names]
        _check_split(files)
        if mmproj is not None:
            return cls(files, _vision_tower(mmproj, files[0]))
        if architecture_of(files[0]) in WITH_VISION:
            name = mmproj_of(path.name, {each.name for each in path.parent.iterdir()})
            beside = GgufFile.read(path.with_name(name)) if name is not None else None
            return cls(files, beside if beside is not None and _belongs(beside, files) else None)
        return cls(files)

    @property
    def path(self) -> Path:
        return self.files[0].path


def architecture_of(file: GgufFile) -> str:
    """What a model is, in llama.cpp's words.

    Raises:
        ConfigError: the file has something else than a text for it.
    """
    return file.keys("general").text("architecture", "")


def _vision_tower(path: Path, model: GgufFile) -> GgufFile:
    """The file that somebody names for a model.

    Raises:
        CheckpointError: it is missing, damaged or no vision tower, or the model takes no pictures.
    """
    if architecture_of(model) not in WITH_VISION:
        raise CheckpointError(
            f"{model.path} takes no pictures: it is of architecture {architecture_of(model)!r:.80}; leave out mmproj"
        )
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; mmproj names the one with the vision tower of a GGUF model")
    file = GgufFile.read(path)
    if architecture_of(file) != _VISION:
        raise CheckpointError(
            f"{path} is of architecture {architecture_of(file)!r:.80}, and no vision tower; its name begins with mmproj"
        )
    return file


def _belongs(mmproj: GgufFile, files: Sequence[GgufFile]) -> bool:
    """Whether a vision tower ends in features of a model's width."""
    width = files[0].keys(architecture_of(files[0])).integer("embedding_length", 0)
    projection = mmproj.tensors.get("mm.model.fc.weight")
    return projection is None or projection.shape[0] == width


def _check_split(files: Sequence[GgufFile]) -> None:
    """Raises:
    CheckpointError: the files are not all of one model.
    """
    count = sum(len(file.tensors) for file in files)
    for i, file in enumerate(files):
        keys = file.keys("split")
        said = (keys.integer("no", 0), keys.integer("count", 1) or 1)
        total = keys.integer("tensors.count", count)
        if said != (i, len(files)) or total != count:
            raise CheckpointError(
                f"{file.path} says that it is number {said[0]} of {said[1]} files, counted from 0, with {total} "
                f"tensors, and is number {i} of {len(files)} with {count}; fetch all files of the model again"
            )


class GgufTensors:
    """The tensors of some files as a `Source` under their own names: floats as they are, all else as the bytes of its
    rows. They are parts of the files' private memory maps.

    Raises:
        CheckpointError: a tensor that is in two files.
    """

    notes = ()

    def __init__(self, files: Sequence[GgufFile]) -> None:
        self.plan: QuantizationPlan = {}
        self._tensors: dict[str, tuple[GgufFile, GgufTensor]] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name in self._tensors:
                    raise CheckpointError(f"{name} is in {self._tensors[name][0].path} and in {file.path}; fetch both")
                self._tensors[name] = file, tensor
        self._maps: dict[Path, Tensor] = {}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> GgufTensor:
        """Where it lies, and of which type it is."""
        return self._tensors[name][1]

    def spec(self, name: str) -> TensorSpec:
        tensor = self.tensor(name)
        if tensor.type.name in FLOATS:
            return TensorSpec(tensor.shape, FLOATS[tensor.type.name])
        *rows, inputs = tensor.shape
        return TensorSpec((*rows, inputs // tensor.type.block * tensor.type.nbytes), torch.uint8)

    def read(self, name: str) -> Tensor:
        file, tensor = self._tensors[name]
        shape, dtype = self.spec(name)
        stored = self._map(file.path)[tensor.offset : tensor.offset + tensor.nbytes]
        return stored.view(dtype).view(shape)

    def is_mapped(self, name: str) -> bool:
        return True

    def origin(self, name: str) -> Origin:
        return Origin(name, str(self._tensors[name][0].path) if name in self._tensors else None)

    def _map(self, path: Path) -> Tensor:
        if path not in self._maps:
            self._maps[path] = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
        return self._maps[path]
