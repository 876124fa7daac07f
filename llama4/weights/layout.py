"""What a layout of checkpoints is: how a directory is recognised, read and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from llama4.config import Llama4Config
from llama4.text.tokenizer import Tokenizer
from llama4.weights.safetensors import Shards
from llama4.weights.side_files import NO_SIDE_FILES, SideFiles
from llama4.weights.source import Source
from llama4.weights.stamps import new_stamp

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class WriteOptions:
    """How a layout writes a checkpoint.

    Attributes:
        side_files: what stood beside the weights where the model comes from; written again but for what changed.
        name: under which the model is loaded, for its card; None writes no card, and Meta's layout has none.
        ranks: files of Meta's layout, one per GPU.
        max_shard_bytes: most bytes of a file in Hugging Face's layout.
        stamp: of the files with the weights, see `stamps`.
        progress: show a bar, where somebody sees it.
    """

    side_files: SideFiles = NO_SIDE_FILES
    name: str | None = None
    ranks: int = 1
    max_shard_bytes: int = MAX_SHARD_BYTES
    stamp: str = field(default_factory=new_stamp)
    progress: bool = False


class CheckpointLayout(ABC):
    """A new one is a subclass, registered in `checkpoint.LAYOUTS`."""

    name: ClassVar[str]
    """What `llama4 convert --to` calls it."""
    title: ClassVar[str]
    """What people call it."""
    config_files: ClassVar[tuple[str, ...]]
    """Patterns of the files that `read_config` reads."""
    side_files: ClassVar[tuple[str, ...]]
    """Patterns of all files that are read but for the weights."""
    weight_files: ClassVar[tuple[str, ...]]
    """Patterns of those with the weights. Both together are what is fetched from the Hub."""
    in_shards: ClassVar[bool] = False
    """Whether a tensor is in one file, so that `open` can do with `Shards`."""

    @abstractmethod
    def recognises(self, directory: Path) -> bool:
        """Whether a directory holds a model in this layout."""

    @property
    def is_written(self) -> bool:
        """Whether there is `write`."""
        return type(self).write is not CheckpointLayout.write

    def has_weights(self, directory: Path) -> bool:
        """Whether some of a model's weights are in its directory."""
        return any(any(directory.glob(pattern)) for pattern in self.weight_files)

    @abstractmethod
    def read_config(self, directory: Path) -> Llama4Config:
        """Raises:
        ConfigError: no configuration, or one that is damaged or of another model.
        """

    def read_side_files(self, directory: Path) -> SideFiles:
        """What stands beside the weights.

        Raises:
            ConfigError: a file that is not what it should be.
        """
        return SideFiles.read(directory)

    @abstractmethod
    def open(
        self,
        directory: Path,
        shards: Shards | None = None,
        *,
        dtype: torch.dtype | None = None,
        room: int | None = None,
    ) -> tuple[Llama4Config, Source]:
        """Configuration and weights, of which nothing is read yet.

        Args:
            shards: the weights, where they are not in the directory, for layouts that are `in_shards`.
            dtype: of what is dequantized; None: the checkpoint's own.
            room: see `experts.stack_experts`.

        Raises:
            ConfigError: see `read_config`.
            CheckpointError: weights that are damaged or incomplete, or quantized in a way that is not run.
        """

    def write(
        self,
        source: Source,
        config: Llama4Config,
        tokenizer: Tokenizer | None,
        directory: Path,
        options: WriteOptions,
    ) -> None:
        """Write a checkpoint into a directory that takes its final name afterwards.

        Args:
            source: complete, see `load.match_names`.
            options: those that the layout has no place for are not used.

        Raises:
            CheckpointError: a model that the layout has no form for.
        """
        raise AssertionError(f"{self.title} layout is read, not written")
