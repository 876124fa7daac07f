"""Meta's layout, in and out."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama4.config import CONFIG_FILE, Llama4Config
from llama4.errors import CheckpointError
from llama4.text.tokenizer import Tokenizer
from llama4.weights.directory import write_json
from llama4.weights.fbgemm import FbgemmSource
from llama4.weights.layout import MAX_SHARD_BYTES, CheckpointLayout
from llama4.weights.meta.params import PARAMS_FILE, config_from_params, params_from_config, read_params
from llama4.weights.meta.source import MetaSource
from llama4.weights.meta.write import write_ranks
from llama4.weights.safetensors import Shards
from llama4.weights.side_files import LICENCE_FILES, MODEL_CARD
from llama4.weights.source import Source

_NORM = "language_model.model.norm.weight"


class MetaLayout(CheckpointLayout):
    """`params.json`, `consolidated.NN.pth` and `tokenizer.model`."""

    name = "meta"
    title = "Meta's"
    config_files = (PARAMS_FILE, "tokenizer.model")  # special tokens follow its ranks
    side_files = (*config_files, MODEL_CARD, *LICENCE_FILES)
    weight_files = ("consolidated.*.pth", "fp8_scales_*.pt")

    def recognises(self, directory: Path) -> bool:
        return (directory / PARAMS_FILE).is_file() and not (directory / CONFIG_FILE).is_file()

    def read_config(self, directory: Path) -> Llama4Config:
        return read_params(directory)

    def open(
        self, directory: Path, shards: Shards | None = None, *, dtype: torch.dtype | None = None
    ) -> tuple[Llama4Config, Source]:
        config = read_params(directory)
        source = MetaSource(directory, config)
        if _NORM in source.names():  # params.json does not say the dtype
            config = dataclasses.replace(config, dtype=str(source.spec(_NORM).dtype).removeprefix("torch."))
        return config, FbgemmSource(source) if source.is_quantized else source

    def write(
        self,
        source: Source,
        config: Llama4Config,
        tokenizer: Tokenizer | None,
        directory: Path,
        *,
        ranks: int = 1,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: bool = False,
    ) -> None:
        if source.plan:
            raise CheckpointError(
                "the model is quantized, for which Meta's layout has no form; convert its bf16 original"
            )
        params = params_from_config(config)
        if tokenizer is not None:
            _check_tokenizer(tokenizer, config, params)
        write_json(directory / PARAMS_FILE, params)
        write_ranks(source, config, directory, ranks, progress=progress)
        if tokenizer is not None:
            write_tokenizer_model(tokenizer, directory / "tokenizer.model")


def _check_tokenizer(tokenizer: Tokenizer, config: Llama4Config, params: Mapping[str, Any]) -> None:
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
