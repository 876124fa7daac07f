"""Checkpoints from one layout to another, without a model: tensor by tensor, bit by bit."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.model import Llama4Model
from llama4.tokenizer import Tokenizer
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.loader import match
from llama4.weights.meta import write_ranks
from llama4.weights.params import PARAMS_FILE, config_from_params, params_from_config
from llama4.weights.saver import complete_directory, save, write_json

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
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the source itself; choose a new directory")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose a new directory, or remove that one first")
    config, weights = open_checkpoint(source)
    with torch.device("meta"):
        match(Llama4Model(config), weights)
    try:
        tokenizer = Tokenizer(source)
    except FileNotFoundError:
        tokenizer = None
    if layout == "hf":
        write_extra = tokenizer.save if tokenizer is not None else None
        save(weights, config, target, write_extra=write_extra, progress=progress)
        return
    params = params_from_config(config)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config, params)
    with complete_directory(target) as partial:
        write_json(partial / PARAMS_FILE, params)
        write_ranks(weights, config, partial, ranks, progress=progress)
        if tokenizer is not None:
            write_tokenizer_model(tokenizer, partial / "tokenizer.model")


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
