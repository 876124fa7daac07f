"""Checkpoints from one layout to another, or into fewer bits, without a model: tensor by tensor."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from llama4 import __version__
from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.model.multimodal import Llama4Model
from llama4.quantization.modules import swap_modules
from llama4.text.tokenizer import Tokenizer
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.load import match
from llama4.weights.meta import write_ranks
from llama4.weights.meta_params import PARAMS_FILE, config_from_params, params_from_config
from llama4.weights.quantizing import quantized
from llama4.weights.save import complete_directory, save, write_json
from llama4.weights.source import Source

LAYOUTS = ("hf", "meta")


def convert(source: str | Path, target: str | Path, layout: str, *, ranks: int = 1, progress: bool = True) -> None:
    """Write a checkpoint in another layout.

    Args:
        source: a directory in Hugging Face's or Meta's layout.
        target: appears complete, under its name, when all is done; it must not hold anything yet.
        layout: "hf" (one shard at a time is in memory) or "meta" (one rank at a time).
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
    if layout == "hf":
        write_extra = tokenizer.save if tokenizer is not None else None
        save(weights, config, target, write_extra=write_extra, progress=progress)
        return
    if weights.plan:
        raise CheckpointError(f"{source} is quantised, for which Meta's layout has no form; convert its bf16 original")
    params = params_from_config(config)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config, params)
    with complete_directory(target) as partial:
        write_json(partial / PARAMS_FILE, params)
        write_ranks(weights, config, partial, ranks, progress=progress)
        if tokenizer is not None:
            write_tokenizer_model(tokenizer, partial / "tokenizer.model")


def quantize(
    source: str | Path,
    target: str | Path,
    scheme: str,
    *,
    head: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = True,
) -> None:
    """Write a checkpoint in few bits, in the compressed-tensors format, which vLLM and transformers read as well.

    One shard and one tensor are in memory at a time. Interrupted, even killed, it goes on behind the last shard that
    was done when called again, and the result is the same to the bit.

    Args:
        source: a directory in Hugging Face's or Meta's layout, not quantised.
        target: appears complete, under its name, when all is done; it must not hold anything yet.
        scheme: a key of `llama4.quantization.schemes.SCHEMES`.
        head: quantise the head, too.
        max_shard_bytes: more than this and the weights are split.
        progress: show a bar, if stderr is a terminal.

    Raises:
        ValueError: an unknown scheme, a target that is in use, a source that is damaged or quantised already; or one of
            its classes `ConfigError` and `CheckpointError`.
    """
    source, target = Path(source), Path(target)
    config, weights, tokenizer = _open(source, target)
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".pth", ".json"))
    stamp = {
        "llama4": __version__,
        "scheme": [scheme, head, max_shard_bytes],
        "source": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    save(
        quantized(weights, scheme, head=head),
        config,
        target,
        write_extra=tokenizer.save if tokenizer is not None else None,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        stamp=json.dumps(stamp),
    )


def _open(source: Path, target: Path) -> tuple[Llama4Config, Source, Tokenizer | None]:
    """A checkpoint that is whole, to be written to a directory that is free."""
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the source itself; choose a new directory")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose a new directory, or remove that one first")
    config, weights = open_checkpoint(source)
    with torch.device("meta"):
        model = Llama4Model(config)
    swap_modules(model, weights.plan)
    match(model, weights)
    try:
        return config, weights, Tokenizer(source)
    except FileNotFoundError:
        return config, weights, None


def _check_tokenizer(tokenizer: Tokenizer, config: Llama4Config, params: dict[str, Any]) -> None:
    """In Meta's layout special tokens have no ids of their own: they follow the ranks, in a fixed order.

    Raises:
        CheckpointError: the model takes another token for a picture's patches.
    """
    patch = config_from_params(params, len(tokenizer.ranks)).image_token_index
    if config.vision is not None and config.image_token_index != patch:
        raise CheckpointError(
            f"image_token_index is {config.image_token_index}, but Meta's layout makes it {patch}, since the tokenizer "
            f"has {len(tokenizer.ranks)} ranks; keep Hugging Face's layout"
        )


def write_tokenizer_model(tokenizer: Tokenizer, path: Path) -> None:
    """The ranks in tiktoken's format; which special tokens follow them is fixed in the code of all who read it."""
    ranked = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % tokenizer.ranks[token] for token in ranked))
