"""Model -> checkpoint in Hugging Face's layout, complete under its final name or not there at all."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from llama4.config import CONFIG_FILE, IMAGE_CONFIG_FILES, Llama4Config
from llama4.errors import CheckpointError
from llama4.quantization.nf4 import KIND as NF4
from llama4.quantization.schemes import Format
from llama4.quantization.weight import PackedWeight
from llama4.weights import bitsandbytes
from llama4.weights.compressed import ExpandedSource, quantization_config
from llama4.weights.names import MULTIMODAL, TEXT_ONLY, Names
from llama4.weights.source import INDEX_FILE, SINGLE_FILE, Source

_STAMP = "stamp.txt"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|consolidated\.\d\d\.pth")


class ModelSource:
    """The parameters of a model, tied ones once, in the dtype that they have; packed weights as they were loaded."""

    names: Names = MULTIMODAL

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._parts: dict[str, tuple[PackedWeight, str]] = {}
        self.plan: dict[str, Format] = {}
        for path, module in model.named_modules():
            if isinstance(module, PackedWeight):
                self.plan[f"{path}.weight" if len(module.shape) == 2 else path] = module.format
                self._parts |= {f"{path}.{part}": (module, part) for part, _ in module.named_parameters()}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        module, part = self._parts.get(key, (None, ""))
        if module is None or part != module.parts[0]:
            return self._tensors[key].dtype
        return module.part_shapes(module.format, module.shape)[part][1]

    def tensor(self, key: str) -> Tensor:
        if key not in self._parts:
            return self._tensors[key]
        module, part = self._parts[key]
        return module.checkpoint_layout(part)


def save(
    source: Source | nn.Module,
    config: Llama4Config,
    directory: str | Path,
    *,
    write_extra: Callable[[Path], object] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
    stamp: str | None = None,
) -> None:
    """Write weights, `config.json`, `generation_config.json` and the image processor's configuration.

    Args:
        source: a model, or a checkpoint of which one shard at a time is in memory.
        directory: see `complete_directory`.
        write_extra: called with the temporary directory, to add e.g. the tokenizer's files.
        max_shard_bytes: more than this and the weights are split, with an index.
        progress: show a bar, if stderr is a terminal.
        stamp: what the result depends on, in words. With it the shards that are done survive an interruption, and the
            next run with the same stamp goes on behind them.

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full; nothing is left half written.
    """
    if isinstance(source, nn.Module):
        source = ModelSource(source)
    if any(format.kind == NF4 for format in source.plan.values()):
        source = bitsandbytes.WrittenSource(source)
    elif source.plan:
        source = ExpandedSource(source)
        config = dataclasses.replace(config, quantization_config=quantization_config(source))
    else:
        config = dataclasses.replace(config, quantization_config=None)
    with complete_directory(directory) if stamp is None else resumed_directory(directory, stamp) as partial:
        _write(source, config, partial, max_shard_bytes, progress)
        if write_extra is not None:
            write_extra(partial)


@contextmanager
def complete_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory beside the target, which takes its place when the block ends well.

    A new target appears at once, complete; in one that has content already, files are replaced one by one, others are
    left alone, and weights of an older model are removed last.

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full.
    """
    directory = Path(directory).resolve()
    partial: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-partial-", dir=directory.parent))
        partial.chmod(0o755)
        yield partial
        _move(partial, directory)
    except OSError as error:
        raise CheckpointError(
            f"could not write the model to {directory}: {error.strerror or error}; free space or choose "
            "another directory"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumed_directory(directory: str | Path, stamp: str) -> Iterator[Path]:
    """As `complete_directory`; but if the block does not end well the temporary directory stays, and the next block
    with the same stamp gets it as it is.

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full; or another process is at it.
    """
    directory = Path(directory).resolve()
    partial = directory.with_name(f".{directory.name}-partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        note = partial / _STAMP
        if not note.is_file() or note.read_text(encoding="utf-8") != stamp:
            shutil.rmtree(partial)
            partial.mkdir()
            note.write_text(stamp, encoding="utf-8")
        with note.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another process is writing {directory}; wait for it, or stop it") from None
            yield partial
            note.unlink()
            _move(partial, directory)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"could not write the model to {directory}: {error.strerror or error}; free space or choose another "
            f"directory. What is done stays in {partial} for another try"
        ) from error


def _write(source: Source, config: Llama4Config, directory: Path, max_shard_bytes: int, progress: bool) -> None:
    table = MULTIMODAL if config.vision is not None else TEXT_ONLY
    keys = {}  # in the file -> in the source
    for key in source.keys():  # noqa: SIM118 (a Source is no dict)
        name = source.names.to_model(key)
        assert name is not None, f"{key} is of no parameter"
        keys[table.to_file(name) or name] = key
    sizes = {key: math.prod(source.shape(old)) * source.dtype(old).itemsize for key, old in keys.items()}
    floats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    whole = [old for key, old in keys.items() if not key.endswith(("absmax", "quant_map"))]
    dtypes = [str(dtype).removeprefix("torch.") for key in whole if (dtype := source.dtype(key)) in floats]
    config = dataclasses.replace(config, dtype=max(dtypes, key=dtypes.count))
    text = config.text
    write_json(directory / CONFIG_FILE, config.to_dict())
    generation = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": list(text.eos_token_id),
        "pad_token_id": text.pad_token_id,
    }
    write_json(directory / "generation_config.json", generation)
    if config.vision is not None:
        write_json(directory / IMAGE_CONFIG_FILES[0], config.preprocessor_dict())
    shards = list(_shards(sizes, max_shard_bytes))
    places: dict[str, str] = {}
    with tqdm(total=len(keys), desc="writing", unit="tensor", disable=None if progress else True, leave=False) as bar:
        for i, shard in enumerate(shards):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            if not (directory / name).exists():  # else it is of a run that was interrupted
                _save_shard({key: source.tensor(keys[key]) for key in shard}, directory / name)
            places |= dict.fromkeys(shard, name)
            bar.update(len(shard))
    if len(shards) > 1:
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _shards(sizes: dict[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Cut into runs of at most `max_bytes`, a tensor at least."""
    shard, used = list[str](), 0
    for key, size in sizes.items():
        if shard and used + size > max_bytes:
            yield shard
            shard, used = [], 0
        shard.append(key)
        used += size
    yield shard


def _save_shard(shard: dict[str, Tensor], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    try:
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, unfinished, metadata={"format": "pt"})
    except Exception as error:  # safetensors wraps the system's error in one of its own
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path.name}: {error}") from error
    unfinished.chmod(0o644)
    unfinished.replace(path)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move(partial: Path, directory: Path) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        partial.replace(directory)  # rename(2) takes the place of an empty directory
        return
    new = {path.name for path in partial.iterdir()}
    for name in sorted(new):
        os.replace(partial / name, directory / name)
    for path in directory.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in new:
            path.unlink()
