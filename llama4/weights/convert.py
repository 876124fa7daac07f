"""Checkpoints from one layout to another, or quantized, without a model: tensor by tensor."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.families import family_of
from llama4.quantization.modules import swap_modules
from llama4.text.tokenizer import Tokenizer
from llama4.version import __version__
from llama4.weights.checkpoint import LAYOUTS, open_checkpoint
from llama4.weights.directory import complete_directory
from llama4.weights.layout import MAX_SHARD_BYTES
from llama4.weights.load import match_names
from llama4.weights.quantizing import quantized
from llama4.weights.save import save
from llama4.weights.source import Source

logger = logging.getLogger(__name__)


def convert(source: str | Path, target: str | Path, layout: str, *, ranks: int = 1, progress: bool = True) -> None:
    """Write a checkpoint in another layout.

    Args:
        source: a directory in any layout.
        target: appears complete, under its name, when all is done; it must not hold anything yet.
        layout: a key of `checkpoint.LAYOUTS`: "hf" (one shard at a time is in memory) or "meta" (one rank at a time).
        ranks: files of Meta's layout, one per GPU of Meta's runtime.
        progress: show a bar, if stderr is a terminal.

    Raises:
        ValueError: an unknown layout, a target that is in use, a source that is damaged or cannot be expressed in the
            other layout; or one of its classes `ConfigError` and `CheckpointError`.
    """
    source, target = Path(source), Path(target)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; choose one of {', '.join(LAYOUTS)}")
    config, weights, tokenizer = _open(source, target)
    with complete_directory(target) as partial:
        LAYOUTS[layout].write(weights, config, tokenizer, partial, ranks=ranks, progress=progress)


def quantize(
    source: str | Path,
    target: str | Path,
    scheme: str,
    *,
    head: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Write a quantized checkpoint in the compressed-tensors format, which vLLM and transformers read as well.

    One shard and one tensor are in memory at a time. Interrupted, even killed, it continues after the last complete
    shard when called again, and the result is the same, bit by bit.

    Args:
        source: a directory in any layout, not quantized.
        target: appears complete, under its name, when all is done; it must not hold anything yet.
        scheme: a key of `llama4.quantization.schemes.SCHEMES`.
        head: quantize the head, too.
        max_shard_bytes: more than this and the weights are split.
        progress: show a bar, if stderr is a terminal.

    Raises:
        ValueError: an unknown scheme, a target that is in use, a source that is damaged or quantized already; or one of
            its classes `ConfigError` and `CheckpointError`.
    """
    source, target = Path(source), Path(target)
    config, weights, tokenizer = _open(source, target)
    files = sorted(path for path in source.iterdir() if path.is_file())
    stamp = {
        "llama4": __version__,
        "scheme": [scheme, head, max_shard_bytes],
        "source": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    save(
        quantized(weights, scheme, head=head, parts=family_of(config).quantizable),
        config,
        target,
        write_extra=tokenizer.save if tokenizer is not None else None,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        stamp=json.dumps(stamp),
    )


def _open(source: Path, target: Path) -> tuple[Llama4Config, Source, Tokenizer | None]:
    """A complete checkpoint, to be written to a directory that is free."""
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the source itself; choose a new directory")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose a new directory, or remove that one first")
    config, weights = open_checkpoint(source)
    for note in weights.notes:
        logger.warning("%s: %s", source, note)
    family = family_of(config)
    with torch.device("meta"):
        model = family.build(config)
    swap_modules(model, weights.plan)
    match_names(model, weights)
    try:
        return config, weights, Tokenizer(source, vocabulary=family.vocabulary)
    except FileNotFoundError:
        return config, weights, None
