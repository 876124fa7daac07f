"""Model -> checkpoint in Hugging Face's layout, complete under its final name or not there at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from llama4.config import CONFIG_FILE, IMAGE_CONFIG_FILES, Llama4Config
from llama4.errors import CheckpointError
from llama4.weights.rules import MULTIMODAL, TEXT_ONLY
from llama4.weights.source import INDEX_FILE, SINGLE_FILE

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save(
    model: nn.Module,
    config: Llama4Config,
    directory: str | Path,
    *,
    write_extra: Callable[[Path], object] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write weights, `config.json`, `generation_config.json` and the image processor's configuration.

    All goes to a temporary directory beside the target first. A new target appears at once, complete; in one that has
    content already, files are replaced one by one, others are left alone, and shards of an older model are removed
    last.

    Args:
        model: parameters are saved in the dtype that they have, tied ones once.
        directory: created if need be.
        write_extra: called with the temporary directory, to add e.g. the tokenizer's files.
        max_shard_bytes: more than this and the weights are split, with an index.

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full; nothing is left half written.
    """
    directory = Path(directory).resolve()
    partial: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-partial-", dir=directory.parent))
        partial.chmod(0o755)
        _write(model, config, partial, max_shard_bytes)
        if write_extra is not None:
            write_extra(partial)
        _move(partial, directory)
    except OSError as error:
        raise CheckpointError(
            f"could not write the model to {directory}: {error.strerror or error}; free space or choose "
            "another directory"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write(model: nn.Module, config: Llama4Config, directory: Path, max_shard_bytes: int) -> None:
    table = MULTIMODAL if config.vision is not None else TEXT_ONLY
    tensors = {table.to_file(name) or name: p.detach() for name, p in model.named_parameters()}
    dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()]
    config = dataclasses.replace(config, dtype=max(dtypes, key=dtypes.count))
    text = config.text
    _write_json(directory / CONFIG_FILE, config.to_dict())
    generation = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": list(text.eos_token_id),
        "pad_token_id": text.pad_token_id,
    }
    _write_json(directory / "generation_config.json", generation)
    if config.vision is not None:
        _write_json(directory / IMAGE_CONFIG_FILES[0], config.preprocessor_dict())
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _save_shard(shards[0], directory / SINGLE_FILE)
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _save_shard(shard, directory / name)
        places |= dict.fromkeys(shard, name)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> Iterable[dict[str, Tensor]]:
    """Cut into runs of at most `max_bytes`, a tensor at least."""
    shard: dict[str, Tensor] = {}
    used = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shard and used + size > max_bytes:
            yield shard
            shard, used = {}, 0
        shard[key] = tensor
        used += size
    yield shard


def _save_shard(shard: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, path, metadata={"format": "pt"})
    except Exception as error:  # safetensors wraps the system's error in one of its own
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(0o644)


def _write_json(path: Path, content: object) -> None:
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
