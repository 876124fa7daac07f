"""A cache of one sequence as a file: safetensors, with a tensor of bytes per layer and block."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama4.cache.formats import Unquantized
from llama4.cache.sequence import SequenceCache

_TOKENS = "tokens"
_DTYPES = {torch.int64: "I64", torch.uint8: "U8"}


def save_cache(path: Path, cache: SequenceCache, tokens: Tensor, model: str) -> None:
    """Write a cache of one row, complete or not at all.

    Args:
        tokens: what it holds, [S] int64.
        model: a fingerprint of the model that computed it.

    Raises:
        ValueError: the file cannot be written.
    """
    counts = cache.num_blocks(cache.start[0], cache.next_position[0])
    blocks = {
        f"{i}.{j}": block
        for i, (layer, count) in enumerate(zip(cache.layers, counts, strict=True))
        for j, block in enumerate(layer.rows[0][:count])  # there may be one more, for the next token
    }
    tensors = {_TOKENS: tokens} | {key: block.cpu() for key, block in blocks.items()}
    metadata = {"model": model, "formats": _formats(cache), "first": str(cache.start[0])}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(partial, tensors, metadata)
        partial.replace(path)
    except OSError as error:
        raise ValueError(
            f"could not write the cache to {path}: {error.strerror or error}; free {cache.num_bytes:,} bytes or "
            "choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_cache(path: str | Path, cache: SequenceCache, model: str) -> Tensor:
    """Read what `save_cache` wrote into a cache of one row, which stays as it is if that fails; -> the tokens of it.

    Raises:
        ValueError: no such file, a damaged one, or the cache of another model or dtype.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata() or {}, set(file.keys())
            if metadata.get("model") != model:
                raise ValueError(f"{path} is the cache of another model; read the prompt again with this one")
            formats = _current_names(metadata["formats"])
            if formats != _formats(cache):
                raise ValueError(
                    f"{path} holds {formats}, but the cache of this model is {_formats(cache)}; "
                    "load the model with the same cache_dtype, or read the prompt again"
                )
            tokens: Tensor = file.get_tensor(_TOKENS)
            start = int(metadata["first"])
            names = [
                [f"{i}.{j}" for j in range(count)]
                for i, count in enumerate(cache.num_blocks(start, start + len(tokens)))
            ]
            if missing := [name for layer in names for name in layer if name not in keys]:
                raise ValueError(f"{path} lacks {', '.join(missing)}; it is damaged, read the prompt again")
            blocks = [[file.get_tensor(name) for name in layer] for layer in names]
            try:
                cache.restore(start, start + len(tokens), blocks)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}; read the prompt again") from error
    except (SafetensorError, KeyError, FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path} cannot be read as a saved cache: {error}") from error
    return tokens


def _formats(cache: SequenceCache) -> str:
    names = [str(f.dtype) if isinstance(f := layer.format, Unquantized) else f.name for layer in cache.layers]
    return ", ".join(dict.fromkeys(name.removeprefix("torch.") for name in names))


def _current_names(formats: str) -> str:
    """Files of version 0.1 have the names of classes."""
    formats = re.sub(r"AsIs\(dtype=torch\.(\w+)\)", r"\1", formats)
    return re.sub(r"(Int8|Fp8|Int4)\(\)", lambda match: match[1].lower(), formats)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, tensor after tensor: the package's own function first copies them all."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.itemsize
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().data)
