"""Model -> checkpoint in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llama4.config import Llama4Config
from llama4.files import real_path
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_config import CONFIG_FILES
from llama4.weights.checkpoint import LAYOUTS
from llama4.weights.directory import complete_directory
from llama4.weights.huggingface import FLOATS
from llama4.weights.layout import MAX_SHARD_BYTES, WriteOptions
from llama4.weights.model_source import ModelSource
from llama4.weights.ordered import without_orders
from llama4.weights.safetensors import INDEX_FILE
from llama4.weights.side_files import NO_SIDE_FILES, TEMPLATE_FILES, SideFiles
from llama4.weights.source import Source

TEXT_FILES = ("tokenizer.json", "tokenizer.model", *CONFIG_FILES, *TEMPLATE_FILES)
MODEL_FILES = (
    INDEX_FILE,
    *(pattern for layout in LAYOUTS.values() for pattern in layout.weight_files),
    *(pattern for layout in LAYOUTS.values() for pattern in layout.config_files if pattern not in TEXT_FILES),
)
"""Patterns of what is replaced in a directory, as a whole; `TEXT_FILES` by a model with a tokenizer."""


def save(
    source: Source | nn.Module,
    config: Llama4Config,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    side_files: SideFiles = NO_SIDE_FILES,
    name: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
    must_be_free: bool = False,
) -> None:
    """Write weights, configurations and the tokenizer's files.

    Args:
        source: a model, or a checkpoint of which one shard at a time is in memory.
        directory: see `complete_directory`. What it has of an older model goes.
        tokenizer: the model's.
        side_files: what stood beside the weights where the model comes from; written again but for what changed.
        name: under which the model is loaded, for its card; by default that of the directory.
        max_shard_bytes: more than this and the weights are split, with an index.
        progress: show a bar, where somebody sees it.
        must_be_free: the directory must not hold anything.

    Raises:
        DiskError: the directory cannot be written, or the disk is full; nothing is left half written.
    """
    tensors = ModelSource(source) if isinstance(source, nn.Module) else source
    older = MODEL_FILES if tokenizer is None else (*MODEL_FILES, *TEXT_FILES)
    name = name or real_path(directory).name
    options = WriteOptions(side_files, name, max_shard_bytes=max_shard_bytes, progress=progress)
    with complete_directory(directory, must_be_free=must_be_free, older=older) as partial:
        tensors = without_orders(tensors, FLOATS.get(config.dtype, torch.bfloat16))
        LAYOUTS["hf"].write(tensors, config, tokenizer, partial, options)
