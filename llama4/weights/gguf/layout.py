"""GGUF as a layout of checkpoints. What others have in files beside the weights is in the metadata here."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from llama4.config import GENERATION_FILE, Llama4Config
from llama4.reading import MAX_CONFIG_BYTES, check_size
from llama4.weights.gguf.config import read_config, reply_ends
from llama4.weights.gguf.files import GgufModel, GgufTensors, is_gguf
from llama4.weights.gguf.sampling import read_sampling
from llama4.weights.gguf.source import model_source
from llama4.weights.layout import CheckpointLayout
from llama4.weights.safetensors import Shards
from llama4.weights.side_files import FURTHER_TEMPLATES, TEMPLATE_FILE, HubOrigin, SideFiles
from llama4.weights.source import Source
from llama4.weights.unreadable import check_fetched

_TEMPLATE = "tokenizer.chat_template"


class GgufLayout(CheckpointLayout):
    """One file, or a split of several, which are named by the first: where others have a directory, this has a file.

    Args:
        mmproj: the file with the vision tower; by default the one beside the model, if that has pictures.
    """

    name = "gguf"
    title = "GGUF's"
    config_files = ()
    side_files = ()
    weight_files = ()

    def __init__(self, mmproj: Path | None = None) -> None:
        self._mmproj = mmproj

    def recognises(self, directory: Path) -> bool:
        return directory.is_file() and is_gguf(directory)

    def has_weights(self, directory: Path) -> bool:
        return True

    def read_config(self, directory: Path) -> Llama4Config:
        return self.open(directory)[0]

    def read_side_files(self, directory: Path) -> SideFiles:
        """The chat templates, and how tokens are chosen, as files of Hugging Face's layout."""
        file = GgufModel.read(directory).files[0]
        metadata, further = file.metadata, file.keys("tokenizer").texts("chat_templates")
        templates = {TEMPLATE_FILE: metadata.get(_TEMPLATE)}
        templates |= {
            FURTHER_TEMPLATES.replace("*", name): metadata.get(f"{_TEMPLATE}.{name}")
            for name in further
            if re.fullmatch(r"\w{1,64}", name)
        }
        files = SideFiles(origin=HubOrigin.of_snapshot(directory))
        for name, template in templates.items():
            if isinstance(template, str):
                check_size(f"{name} in {directory}", len(template), MAX_CONFIG_BYTES)
                files = files.with_text(name, template)
        if sampling := read_sampling(file):
            ends = {"eos_token_id": list(reply_ends(file.keys("tokenizer.ggml")))}
            files = files.with_json(GENERATION_FILE, {**ends, **sampling})
        return files

    def open(
        self,
        directory: Path,
        shards: Shards | None = None,
        *,
        dtype: torch.dtype | None = None,
        room: int | None = None,
    ) -> tuple[Llama4Config, Source]:
        check_fetched([directory])
        model = GgufModel.read(directory, self._mmproj)
        files = [*model.files, *([model.mmproj] if model.mmproj is not None else [])]
        tensors = GgufTensors(files)
        config = read_config(model, tensors)
        return config, model_source(tensors, dtype or getattr(torch, config.dtype))
