"""Model -> checkpoint in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor, nn

from llama4.config import Llama4Config
from llama4.quantization.weight import QuantizedWeight, TensorSpec, WeightFormat
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_config import CONFIG_FILES
from llama4.weights.checkpoint import LAYOUTS
from llama4.weights.directory import complete_directory
from llama4.weights.layout import MAX_SHARD_BYTES
from llama4.weights.safetensors import INDEX_FILE
from llama4.weights.side_files import NO_SIDE_FILES, TEMPLATE_FILES, SideFiles
from llama4.weights.source import Origin, Source

TEXT_FILES = ("tokenizer.json", "tokenizer.model", *CONFIG_FILES, *TEMPLATE_FILES)
MODEL_FILES = (
    INDEX_FILE,
    *(pattern for layout in LAYOUTS.values() for pattern in layout.weight_files),
    *(pattern for layout in LAYOUTS.values() for pattern in layout.config_files if pattern not in TEXT_FILES),
)
"""Patterns of what is replaced in a directory, as a whole; `TEXT_FILES` by a model with a tokenizer."""


class ModelSource:
    """The parameters of a model, tied ones once, in the dtype that they have; packed weights as in a checkpoint."""

    notes = ()

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._parts: dict[str, tuple[QuantizedWeight, str]] = {}
        self.plan: dict[str, WeightFormat] = {}
        for path, module in model.named_modules():
            if isinstance(module, QuantizedWeight):
                self.plan[f"{path}.weight" if len(module.shape) == 2 else path] = module.format
                self._parts |= {f"{path}.{part}": (module, part) for part in module.specs}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def spec(self, name: str) -> TensorSpec:
        tensor = self._tensors[name]
        module, part = self._parts.get(name, (None, ""))
        is_values = module is not None and part == module.format.parts[0]
        return TensorSpec(tuple(tensor.shape), module.specs[part].dtype if module and is_values else tensor.dtype)

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._tensors[name]
        module, part = self._parts[name]
        return module.checkpoint_layout(part)

    def is_mapped(self, name: str) -> bool:
        return False

    def origin(self, name: str) -> Origin:
        return Origin(name)


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

    Raises:
        CheckpointError: the directory cannot be written, or the disk is full; nothing is left half written.
    """
    tensors = ModelSource(source) if isinstance(source, nn.Module) else source
    older = MODEL_FILES if tokenizer is None else (*MODEL_FILES, *TEXT_FILES)
    with complete_directory(directory, older=older) as partial:
        LAYOUTS["hf"].write(
            tensors,
            config,
            tokenizer,
            partial,
            side_files=side_files,
            name=name or Path(directory).resolve().name,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
