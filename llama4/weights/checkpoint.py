"""A directory -> its configuration and weights, whichever layout it is in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.weights import bitsandbytes, compressed, fbgemm
from llama4.weights.meta import MetaSource
from llama4.weights.meta_params import is_meta, read_params
from llama4.weights.source import Source, open_source


def read_config(directory: str | Path) -> Llama4Config:
    """The configuration in a directory of Hugging Face's or Meta's layout.

    Raises:
        ConfigError: none there, or one that is damaged or of another model.
    """
    return read_params(directory) if is_meta(directory) else Llama4Config.from_directory(directory)


def open_checkpoint(directory: str | Path) -> tuple[Llama4Config, Source]:
    """Configuration and weights; of the weights nothing is read yet.

    Raises:
        ConfigError: see `read_config`.
        CheckpointError: weights that are damaged or incomplete, or quantised in a way that is not run.
    """
    config = read_config(directory)
    if (quantization := config.quantization_config) is not None:
        method = quantization.get("quant_method", "unknown")
        if method == fbgemm.METHOD:
            return config, fbgemm.FbgemmSource(open_source(directory))
        if method == bitsandbytes.METHOD:
            bitsandbytes.check_method(quantization)  # refuses before anything is opened
            return config, bitsandbytes.BitsandbytesSource(open_source(directory))
        if method == compressed.METHOD:
            compressed.read_groups(quantization)
            return config, compressed.CompressedSource(open_source(directory), quantization)
        methods = ", ".join(repr(known.METHOD) for known in (compressed, fbgemm, bitsandbytes))
        raise CheckpointError(
            f"{directory} is quantised by {method!r}, which this library does not read; take one in the format of "
            f"{methods}, or in bf16"
        )
    if not is_meta(directory):
        return config, open_source(directory)
    source = MetaSource(directory, config)
    norm = "language_model.model.norm.weight"
    if norm in source.keys():  # noqa: SIM118 (a Source is no dict)
        config = replace(config, dtype=str(source.dtype(norm)).removeprefix("torch."))  # params.json does not say
    return config, fbgemm.FbgemmSource(source) if source.is_quantised else source
