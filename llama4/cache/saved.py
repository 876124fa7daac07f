"""A cache of one sequence as a file: safetensors, with a tensor of bytes per layer and block, or picture.

A file is untrusted: what its header says is compared with the model before anything of it is read, and what is read
with a checksum before the model's cache changes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama4.cache.formats import Unquantized
from llama4.cache.pictures import Picture
from llama4.cache.sequence import SequenceCache
from llama4.config import CACHE_BLOCK
from llama4.errors import Llama4Error
from llama4.files import replaced_file, write_pieces
from llama4.progress import Bar
from llama4.reading import check_safetensors

_TOKENS = "tokens"
_PICTURE = "picture.{}.{}"
_VERSION = "3"
_DTYPES = {torch.int64: "I64", torch.uint8: "U8"}


def save_cache(path: Path, cache: SequenceCache, tokens: Tensor, model: str, progress: bool = False) -> None:
    """Write a cache of one row, complete or not at all. Of a block that is partly used the rest is written as zeros: it
    may hold what other prompts left there.

    Args:
        tokens: what it holds, [S] int64.
        model: a fingerprint of the model that computed it.
        progress: show a bar, where somebody sees it.

    Raises:
        DiskError: the file cannot be written.
    """
    start, next_position = cache.start[0], cache.next_position[0]
    tensors = {_TOKENS: tokens}
    slots = [cache.cached_tokens(0, next_position, window) for window in cache.windows]
    for i, (layer, used) in enumerate(zip(cache.layers, slots, strict=True)):
        for j, block in enumerate(layer.used_blocks(0, used)):
            tensors[f"{i}.{j}"] = block.cpu()
    for i, picture in enumerate(cache.pictures[0]):
        for j, keys_values in enumerate(picture.layers):
            tensors[_PICTURE.format(i, j)] = keys_values.cpu().contiguous().view(torch.uint8)
    metadata = {"version": _VERSION, "model": model, "first": str(start), **_layout(cache)}
    if cache.pictures[0]:
        metadata["pictures"] = " ".join(str(picture.position) for picture in cache.pictures[0])
    metadata["rope_length"] = str(cache.rope_lengths[0])
    metadata["checksum"] = _checksum(metadata, tensors)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    bar = Bar("saving", end, "bytes", shown=progress)
    with bar, replaced_file(path) as file:  # tensor after tensor: the package's own function first copies them all
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            with bar.step(tensor.nbytes):
                write_pieces(file, tensor.contiguous().view(torch.uint8).numpy().data)


def load_cache(path: str | Path, cache: SequenceCache, model: str, max_tokens: int) -> Tensor:
    """Read what `save_cache` wrote into a cache of one row, which stays as it is if that fails; -> the tokens of it.

    Args:
        max_tokens: the model's window.

    Raises:
        Llama4Error: no such file, a damaged one, or the cache of another model or dtype.
        OSError: it cannot be read.
    """
    try:
        check_safetensors(Path(path))
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check_metadata(path, metadata, cache, model)
            names = set(file.keys())
            specs = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in names}
            content = _Content.read(path, metadata, specs, cache, max_tokens)
            tensors = {name: file.get_tensor(name) for name in content.names}
    except FileNotFoundError:
        raise Llama4Error(
            f"{path} cannot be read as a saved cache: there is no such file; give what `save` wrote"
        ) from None
    except SafetensorError as error:
        raise Llama4Error(f"{path} cannot be read as a saved cache: {error}; read the prompt again") from error
    if _checksum(metadata, tensors) != metadata["checksum"]:
        raise _damaged(path, "its content does not have its checksum")
    blocks = [[tensors[name] for name in of_layer] for of_layer in content.blocks]
    pictures = [
        Picture(place, tuple(tensors[name].view(cache.dtype).to(cache.device) for name in of_picture))
        for place, of_picture in content.pictures.items()
    ]
    cache.restore(content.start, content.end, content.rope_length, blocks, pictures)
    return tensors[_TOKENS]


_Specs: TypeAlias = dict[str, tuple[str, list[int]]]
"""Dtype and shape of each tensor of a file."""


@dataclass(frozen=True)
class _Content:
    """What a file holds, by its header, which was compared with the cache that it is for.

    Attributes:
        start, end: positions of the tokens.
        rope_length: see `SequenceCache`.
        blocks: names of each layer's tensors.
        pictures: position -> names of a picture's.
    """

    start: int
    end: int
    rope_length: int
    blocks: list[list[str]]
    pictures: dict[int, list[str]]

    @classmethod
    def read(
        cls, path: str | Path, metadata: dict[str, str], specs: _Specs, cache: SequenceCache, max_tokens: int
    ) -> _Content:
        """Raises:
        Llama4Error: it is damaged.
        """
        length = _shape(path, specs, _TOKENS, "I64")
        first, rope_length = metadata.get("first", ""), metadata.get("rope_length", "")
        if not rope_length.isdecimal():
            raise _damaged(path, f"its rope_length is {rope_length!r}")
        if len(length) != 1 or not first.isdecimal() or int(first) + length[0] > max_tokens:
            raise _damaged(
                path, f"{length} tokens from position {first!r} on are none that a window of {max_tokens} has"
            )
        start, end = int(first), int(first) + length[0]
        blocks = [[f"{i}.{j}" for j in range(count)] for i, count in enumerate(cache.num_blocks(start, end))]
        pictures = {
            place: [_PICTURE.format(i, j) for j in range(len(cache.cross_layers))]
            for i, place in enumerate(_positions(path, metadata, start, end))
        }
        content = cls(start, end, int(rope_length), blocks, pictures)
        if len(specs) != len(content.names):
            raise _damaged(path, f"it has {len(specs) - 1} blocks; {length[0]} tokens take {len(content.names) - 1}")
        for layer, of_layer in zip(cache.layers, blocks, strict=True):
            for name in of_layer:
                if (found := _shape(path, specs, name, "U8")) != [layer.block_bytes]:
                    raise _damaged(path, f"block {name} is {found}, but must be [{layer.block_bytes}]")
        for of_picture in pictures.values():
            if len({tuple(_check_picture(path, n, _shape(path, specs, n, "U8"), cache)) for n in of_picture}) > 1:
                raise _damaged(path, f"the keys of a picture, {of_picture[0]} and others, differ in number")
        return content

    @property
    def names(self) -> list[str]:
        """Of all tensors, as they are summed up."""
        return [_TOKENS, *chain(*self.blocks, *self.pictures.values())]


def _shape(path: str | Path, specs: _Specs, name: str, dtype: str) -> list[int]:
    if name not in specs:
        raise _damaged(path, f"it lacks {name}")
    found, shape = specs[name]
    if found != dtype:
        raise _damaged(path, f"{name} is {found}, not {dtype}")
    return shape


def _positions(path: str | Path, metadata: dict[str, str], start: int, end: int) -> list[int]:
    """Of the tokens that stand for pictures."""
    words = metadata.get("pictures", "").split()
    places = [int(word) if word.isdecimal() else -1 for word in words]
    if places != sorted(set(places)) or not all(start <= place < end for place in places):
        raise _damaged(path, f"its pictures are at {words}")
    return places


def _check_picture(path: str | Path, name: str, found: list[int], cache: SequenceCache) -> list[int]:
    heads, width = cache.picture_shape
    if len(found) != 4 or found[:2] != [2, heads] or found[2] < 1 or found[3] != width * cache.dtype.itemsize:
        raise _damaged(path, f"{name} is {found}, but must be [2, {heads}, keys, {width * cache.dtype.itemsize}]")
    return found


def _check_metadata(path: str | Path, metadata: dict[str, str], cache: SequenceCache, model: str) -> None:
    if "model" not in metadata:
        raise Llama4Error(f"{path} is no saved cache; give what `save` wrote")
    if metadata.get("version") != _VERSION or "checksum" not in metadata:
        raise Llama4Error(
            f"{path} is a cache of version {metadata.get('version', '1')}, which another version of this library "
            "wrote; read the prompt again"
        )
    if metadata["model"] != model:
        raise Llama4Error(f"{path} is the cache of another model; read the prompt again with this one")
    found, own = ({name: values.get(name) for name in _layout(cache)} for values in (metadata, _layout(cache)))
    if found != own:
        raise Llama4Error(
            f"{path} holds {_words(found)}, but the cache of this model is {_words(own)}; load the model with the same "
            "cache_dtype, or read the prompt again"
        )


def _layout(cache: SequenceCache) -> dict[str, str]:
    """How keys and values are stored."""
    names = [str(f.dtype) if isinstance(f := layer.format, Unquantized) else f.name for layer in cache.layers]
    return {
        "formats": ", ".join(dict.fromkeys(name.removeprefix("torch.") for name in names)),
        "block_tokens": str(CACHE_BLOCK),
    }


def _words(layout: dict[str, str | None]) -> str:
    return f"{layout['formats']} in blocks of {layout['block_tokens']} tokens"


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Of all that a file holds."""
    digest = hashlib.sha256(json.dumps([metadata[k] for k in sorted(metadata) if k != "checksum"]).encode())
    for key, tensor in tensors.items():
        digest.update(f"{key} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _damaged(path: str | Path, problem: str) -> Llama4Error:
    return Llama4Error(f"{path} is damaged: {problem}; read the prompt again")
