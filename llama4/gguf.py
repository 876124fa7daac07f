"""GGUF, the container of llama.cpp's files: metadata by key, and where each tensor lies. Nothing of tensors is read.

Numbers are little-endian. A file is: `GGUF`, the version, how many tensors and keys there are; each key with the type
of its value and the value; of each tensor its name, shape, type and offset; then, aligned, the tensors. Versions 2 and
3 are the same but for the byte order that 3 allows. Source: docs/gguf.md of ggml.

Every size, count and offset is checked against the file before anything is made of it: see the limits in reading.py.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama4.errors import CheckpointError, ConfigError, Llama4Error
from llama4.reading import MAX_GGUF_COUNT, MAX_GGUF_HEADER_BYTES, MAX_GGUF_TEXTS, MAX_INT, check_regular
from llama4.units import bytes_text

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"
_VERSIONS = (2, 3)
_MAX_ALIGNMENT = 1 << 16
_MAX_DIMENSIONS = 4
_MAX_NAME = 256
"""Characters of a key or of a tensor's name; ggml allows 64 for tensors."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its letter in `struct` and in numpy."""
_STRING, _ARRAY = 8, 9


class TensorType(NamedTuple):
    """How ggml stores numbers: so many of them in a block of so many bytes."""

    name: str
    block: int
    nbytes: int


_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
}

TYPES = {type_.name: type_ for type_ in _TYPES.values()}
TYPE_NUMBERS = {type_.name: number for number, type_ in _TYPES.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor, which is not read.

    Attributes:
        shape: as torch counts, the rows first.
        type: of its numbers.
        offset: of its first byte in the file.
        nbytes: that it takes.
    """

    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """What the head of a file says.

    Attributes:
        metadata: key -> a number, a text, a list of texts, or a numpy array.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, path: str | Path) -> GgufFile:
        """Read the head of a file.

        Raises:
            CheckpointError: it is no GGUF file, is cut short or damaged, or of a version or type that is not known.
        """
        path = Path(path)
        try:
            check_regular(path)
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 24:
                    raise Llama4Error("it is too short")
                with mmap.mmap(file.fileno(), min(size, MAX_GGUF_HEADER_BYTES), access=mmap.ACCESS_READ) as head:
                    metadata, tensors = _Head(head, size).read()
        except (Llama4Error, struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}; fetch it again") from None
        return cls(path, metadata, tensors)

    def keys(self, prefix: str) -> Keys:
        """The metadata whose keys begin so, to be read with checks: its values are of whatever type the file says."""
        return Keys(self.metadata, prefix, str(self.path))


@dataclass(frozen=True)
class Keys:
    """The metadata of a file, by keys behind the architecture's name, with checks of what is read.

    Attributes:
        prefix: what keys begin with.
        place: the file, for errors.
    """

    metadata: Mapping[str, Any]
    prefix: str
    place: str

    def __contains__(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata

    def integer(self, key: str, default: int | None = None, limit: int = MAX_INT) -> int:
        """A whole number from 0 on; of a list, one for each layer, the one that all are.

        Raises:
            ConfigError: it is missing, or something else.
        """
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise ConfigError(f"{self.place} lacks {self.prefix}.{key}; fetch the file again")
        if isinstance(value, np.ndarray):
            if len({*value.tolist()}) != 1:
                raise ConfigError(
                    f"{self.place}: {self.prefix}.{key} differs by layer, which this library does not run"
                )
            value = value[0].item()
        if type(value) is not int or not 0 <= value <= limit:
            raise ConfigError(f"{self.place}: {self.prefix}.{key} is {value!r:.80}, which should be 0 to {limit:,}")
        return value

    def token(self, key: str) -> int | None:
        """The id of a token; None where there is none, for which some converters write -1.

        Raises:
            ConfigError: it is something else.
        """
        value = self.metadata.get(f"{self.prefix}.{key}")
        return None if value is None or value in (-1, 2**32 - 1) else self.integer(key)

    def number(self, key: str, default: float) -> float:
        """A finite number; one that was rounded to float32 is the shortest that rounds so.

        Raises:
            ConfigError: it is something else.
        """
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise ConfigError(f"{self.place}: {self.prefix}.{key} is {value!r:.80}, which should be a number")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        """Raises:
        ConfigError: it is no text.
        """
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.place}: {self.prefix}.{key} is {value!r:.80}, which should be a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Raises:
        ConfigError: it is neither a boolean nor 0 or 1.
        """
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) not in (bool, int) or value not in (0, 1):
            raise ConfigError(f"{self.place}: {self.prefix}.{key} is {value!r:.80}, which should be true or false")
        return bool(value)

    def texts(self, key: str) -> list[str]:
        """Raises:
        ConfigError: it is no list of texts.
        """
        value = self.metadata.get(f"{self.prefix}.{key}", [])
        if not isinstance(value, list):
            raise ConfigError(f"{self.place}: {self.prefix}.{key} is {value!r:.80}, which should be a list of texts")
        return value


class _Head:
    """The head of a file, read from its first bytes on.

    Args:
        data: the beginning of the file; more than that no head has.
        size: of the file.
    """

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self._size, self._at = data, size, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._take(4) != MAGIC:
            raise Llama4Error(f"it begins with {bytes(self._data[:4])!r} and not with {MAGIC!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            big = version & 0xFFFF == 0
            about = "big-endian, for other machines" if big else f"version {version}, and versions 2 and 3 are read"
            raise Llama4Error(f"it is {about}; convert the model with a newer llama.cpp")
        num_tensors, num_keys = self._count("tensors"), self._count("keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._name("key")
            value = self._value(self._number("I"), key)
            if metadata.setdefault(key, value) is not value:
                raise Llama4Error(f"it has the key {key} twice")
        heads: dict[str, tuple[tuple[int, ...], TensorType, int]] = {}
        for _ in range(num_tensors):
            name = self._name("tensor")
            if name in heads:
                raise Llama4Error(f"it has the tensor {name} twice")
            heads[name] = self._tensor(name)
        alignment = metadata.get(ALIGNMENT, 32)
        if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise Llama4Error(f"{ALIGNMENT} is {alignment!r}, which should be a power of two from 8 on")
        start = -(-self._at // alignment) * alignment
        return metadata, {name: self._placed(name, *head, start, alignment) for name, head in heads.items()}

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            cut = end > self._size
            limit = bytes_text(MAX_GGUF_HEADER_BYTES)
            raise Llama4Error("it is cut short" if cut else f"its head takes more than {limit}")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(letter)))[0]

    def _count(self, what: str) -> int:
        count: int = self._number("Q")
        if count > MAX_GGUF_COUNT:
            raise Llama4Error(f"it says that it has {count:,} {what}, and may have {MAX_GGUF_COUNT:,}")
        return count

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _name(self, what: str) -> str:
        name = self._text()
        if not 0 < len(name) <= _MAX_NAME:
            raise Llama4Error(f"it has the {what} {name[:40]!r} of {len(name)} characters")
        return name

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise Llama4Error(f"{key} is of a type, {kind}, that is not known")
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            return self._texts(count)
        if kind not in _NUMBERS:
            raise Llama4Error(f"{key} is a list of a type, {kind}, that is not known")
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _texts(self, count: int) -> list[str]:
        if count > MAX_GGUF_TEXTS:
            raise Llama4Error(f"it says that it has a list of {count:,} texts, and may have {MAX_GGUF_TEXTS:,}")
        if count > (len(self._data) - self._at) // 8:  # each has its length
            self._take(8 * count)
        data, at, end, texts = self._data, self._at, len(self._data), list[str]()
        for _ in range(count):  # a vocabulary has hundreds of thousands
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            if at > end:
                break
            texts.append(data[start:at].decode("utf-8"))
        if at > end or len(texts) < count:
            self._take(end)
        self._at = at
        return texts

    def _tensor(self, name: str) -> tuple[tuple[int, ...], TensorType, int]:
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise Llama4Error(f"{name} has {dimensions} dimensions, and may have {_MAX_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in _TYPES:
            raise Llama4Error(f"{name} is of type {kind}, which this library does not know")
        if not shape or shape[-1] % _TYPES[kind].block:
            raise Llama4Error(f"{name} has the shape {list(shape)}, of which {_TYPES[kind].name} cannot be")
        return shape, _TYPES[kind], offset

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: TensorType, offset: int, start: int, alignment: int
    ) -> GgufTensor:
        nbytes = math.prod(shape) // kind.block * kind.nbytes
        if offset % alignment or start + offset + nbytes > self._size:
            raise Llama4Error(
                f"{name} lies in bytes {start + offset} to {start + offset + nbytes} of {self._size}: it is cut short, "
                "or damaged"
            )
        return GgufTensor(shape, kind, start + offset, nbytes)
