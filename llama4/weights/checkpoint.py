"""A directory, or a GGUF file, -> its configuration and weights, in whichever layout it is."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from llama4.config import Llama4Config
from llama4.errors import ArgumentError, CheckpointError
from llama4.files import user_path
from llama4.reading import check_regular
from llama4.weights.directory import check_whole
from llama4.weights.gguf.layout import GgufLayout
from llama4.weights.huggingface import HuggingFaceLayout
from llama4.weights.layout import CheckpointLayout
from llama4.weights.meta.layout import MetaLayout
from llama4.weights.safetensors import Shards
from llama4.weights.side_files import SideFiles
from llama4.weights.source import Source
from llama4.weights.unreadable import check_fetched, files_in, why_unreadable

_LAYER = re.compile(r"language_model\.model\.layers\.(\d{1,9})\.")
LAYOUTS: dict[str, CheckpointLayout] = {
    layout.name: layout for layout in (HuggingFaceLayout(), MetaLayout(), GgufLayout())
}
WRITTEN = {name: layout for name, layout in LAYOUTS.items() if layout.is_written}


def recognised_layout(directory: Path) -> CheckpointLayout | None:
    """The layout of a directory; None if it is in none."""
    return next((layout for layout in LAYOUTS.values() if layout.recognises(directory)), None)


def layout_of(directory: str | Path) -> CheckpointLayout:
    """The layout of a directory; Hugging Face's, which says what is missing, if it is in none.

    Raises:
        CheckpointError: files that are not there themselves, files of another format, or of two models.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        check_regular(directory)
    check_whole(directory)
    layout = recognised_layout(directory)
    if layout is None:
        if directory.is_dir() and (why := why_unreadable(files_in(directory))):
            raise CheckpointError(f"{directory} cannot be loaded: {why}")
        return LAYOUTS["hf"]
    patterns = (*layout.side_files, *layout.weight_files)
    check_fetched(path for pattern in patterns for path in directory.glob(pattern))
    return layout


def read_config(directory: str | Path) -> Llama4Config:
    """The configuration in a directory.

    Raises:
        ConfigError: none there, or one that is damaged or of another model.
    """
    return layout_of(directory).read_config(Path(directory))


def read_side_files(directory: str | Path) -> SideFiles:
    """What stands beside the weights in a directory, or, of a GGUF file, in its metadata.

    Raises:
        ConfigError: a file that is not what it should be.
    """
    return layout_of(directory).read_side_files(Path(directory))


def open_checkpoint(
    directory: str | Path,
    shards: Shards | None = None,
    *,
    dtype: torch.dtype | None = None,
    mmproj: str | Path | None = None,
    room: int | None = None,
) -> tuple[Llama4Config, Source]:
    """Configuration and weights, of which nothing is read yet.

    Args:
        shards: the weights, where they are not in the directory: see `hub.locate`.
        dtype: of what is stored in a format that is not run, and so is dequantized; None: the checkpoint's own.
        mmproj: of a GGUF model the file with the vision tower; None: the one beside it, if there is one.
        room: see `experts.stack_experts`.

    Raises:
        ConfigError: see `read_config`.
        CheckpointError: weights that are damaged or incomplete, or quantized in a way that is not run.
    """
    layout = layout_of(directory)
    if mmproj is not None:
        if not isinstance(layout, GgufLayout):
            raise ArgumentError(
                f"mmproj is for models in GGUF, and {directory} is in {layout.title} layout; leave it out"
            )
        layout = GgufLayout(user_path(mmproj))
    config, source = layout.open(Path(directory), shards, dtype=dtype, room=room)
    _check_layers(Path(directory), config, source)
    return config, source


def _check_layers(directory: Path, config: Llama4Config, source: Source) -> None:
    """Before a model is built, see that its weights are of about as many layers; which keys are missing, `load` says.

    Raises:
        CheckpointError: they are not.
    """
    layers = {int(match[1]) for name in source.names() if (match := _LAYER.match(name))}
    if layers and config.text.num_hidden_layers > 2 * len(layers):
        raise CheckpointError(
            f"{directory} has num_hidden_layers = {config.text.num_hidden_layers} in its configuration, and weights of "
            f"{len(layers)} layers; fetch both again"
        )
