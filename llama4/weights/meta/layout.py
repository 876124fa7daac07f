"""Meta's layout, in and out."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama4.config import CONFIG_FILE, GENERATION_FILE, Llama4Config
from llama4.errors import CheckpointError, Llama4Error
from llama4.families import family_of
from llama4.reading import read_json
from llama4.text.gguf_vocabulary import GGUF_SUFFIX
from llama4.text.sentencepiece import SentencePiece, sentencepiece_bytes
from llama4.text.tokenizer import Tokenizer
from llama4.weights.directory import write_json
from llama4.weights.fbgemm import FbgemmSource
from llama4.weights.layout import CheckpointLayout, WriteOptions
from llama4.weights.meta import llama, mllama
from llama4.weights.meta.params import PARAMS_FILE, RANK_FILES, params_from_config, read_params
from llama4.weights.meta.source import MetaSource
from llama4.weights.meta.write import write_ranks
from llama4.weights.safetensors import Shards
from llama4.weights.side_files import SIDE_FILES, generation_content
from llama4.weights.source import Source

_NORM = "language_model.model.norm.weight"


class MetaLayout(CheckpointLayout):
    """`params.json`, `consolidated.NN.pth` and `tokenizer.model`."""

    name = "meta"
    title = "Meta's"
    config_files = (PARAMS_FILE, "tokenizer.model")  # special tokens follow its ranks
    side_files = (*config_files, *SIDE_FILES)
    weight_files = (RANK_FILES, "fp8_scales_*.pt")

    def recognises(self, directory: Path) -> bool:
        return (directory / PARAMS_FILE).is_file() and not (directory / CONFIG_FILE).is_file()

    def read_config(self, directory: Path) -> Llama4Config:
        return _read_config(directory)

    def open(
        self,
        directory: Path,
        shards: Shards | None = None,
        *,
        dtype: torch.dtype | None = None,
        room: int | None = None,
    ) -> tuple[Llama4Config, Source]:
        config = _read_config(directory)
        source = MetaSource(directory, config)
        if _NORM in source.names():  # params.json does not say the dtype
            config = dataclasses.replace(config, dtype=str(source.spec(_NORM).dtype).removeprefix("torch."))
        if config.family in _SHAPES:
            return config, _SHAPES[config.family](source, config)
        return config, FbgemmSource(source) if source.is_quantized else source

    def write(
        self,
        source: Source,
        config: Llama4Config,
        tokenizer: Tokenizer | None,
        directory: Path,
        options: WriteOptions,
    ) -> None:
        if source.plan:
            raise CheckpointError(
                "the model is quantized, for which Meta's layout has no form; convert its bf16 original"
            )
        if config.family not in _PARAMS:
            raise CheckpointError(
                f"{family_of(config).title} is not written in Meta's layout; convert to Hugging Face's layout"
            )
        params = _PARAMS[config.family](config)
        if tokenizer is not None:
            if isinstance(tokenizer.model, SentencePiece):
                _copy_model(tokenizer, tokenizer.model, directory)
            else:
                _check_tokenizer(tokenizer)
                write_tokenizer_model(tokenizer, directory / "tokenizer.model")
        options.side_files.without(CONFIG_FILE).write(directory)
        if GENERATION_FILE not in options.side_files:  # which tokens end a reply; params.json cannot say it
            write_json(directory / GENERATION_FILE, generation_content(config, options.side_files))
        write_json(directory / PARAMS_FILE, params)
        write_ranks(source, config, directory, options.ranks, options.stamp, progress=options.progress)


_PARAMS: dict[str, Callable[[Llama4Config], dict[str, Any]]] = {
    "llama4": params_from_config,
    "llama": llama.params_from_config,
    "mistral": llama.params_from_config,
}
"""What writes params.json, by family."""


_SHAPES: dict[str, Callable[[MetaSource, Llama4Config], Source]] = {"mllama": mllama.in_model_shapes}
"""What shows the tensors of a family's files in the model's shapes, where these differ."""


def _read_config(directory: Path) -> Llama4Config:
    """That of Llama 4, of Llama 1 to 3, or of Llama 3.2 Vision."""
    path = directory / PARAMS_FILE
    if path.is_file() and _says(path, mllama.is_mllama):
        return mllama.read_params(directory)
    return llama.read_params(directory) if path.is_file() and _says(path, llama.is_llama) else read_params(directory)


def _says(path: Path, is_of: Callable[[Mapping[str, Any]], bool]) -> bool:
    try:
        return is_of(read_json(path))
    except Llama4Error:
        return False  # who reads it says what is wrong


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """A tokenizer.model has ranks alone. How text is cut, and which special tokens follow the ranks, in which order, is
    fixed in the code of all who read it.

    Raises:
        CheckpointError: the tokenizer is another one.
    """
    keep = "which a tokenizer.model cannot say; keep Hugging Face's layout"
    first, vocabulary = len(tokenizer.ranks), tokenizer.vocabulary
    if sorted(tokenizer.ranks.values()) != list(range(first)):
        raise CheckpointError(f"the ids of {tokenizer.path}'s {first} ordinary tokens are not 0 to {first - 1}, {keep}")
    if tokenizer.pattern != vocabulary.pattern:
        raise CheckpointError(f"{tokenizer.path} cuts text by a pattern of its own, {tokenizer.pattern!r}, {keep}")
    names = vocabulary.special_token_names(tokenizer.vocab_size - first)
    fixed = {name: first + i for i, name in enumerate(names)}
    text = [token.content for token in tokenizer.added_tokens if not token.special]
    if text:
        raise CheckpointError(f"{text[0]!r} is a token of {tokenizer.path} that is text, {keep}")
    moved = [(name, i) for name, i in tokenizer.special_tokens.items() if fixed.get(name) != i]
    if moved:
        name, i = moved[0]
        raise CheckpointError(
            f"{name} is {i} in {tokenizer.path}, where Meta's layout has {fixed.get(name, 'no such token')}; "
            f"{len(moved)} special tokens have ids of their own, {keep}"
        )


def _copy_model(tokenizer: Tokenizer, model: SentencePiece, directory: Path) -> None:
    """Raises:
    CheckpointError: the tokenizer was read from another file, which does not say when pieces are merged.
    """
    path = tokenizer.path.with_name("tokenizer.model")
    if tokenizer.path.suffix.lower() == GGUF_SUFFIX:
        (directory / path.name).write_bytes(sentencepiece_bytes(model))
        return
    if not path.is_file():
        raise CheckpointError(
            f"{tokenizer.path} is no tokenizer.model of sentencepiece, which Meta's layout has; put that beside it"
        )
    (directory / path.name).write_bytes(path.read_bytes())


def write_tokenizer_model(tokenizer: Tokenizer, path: Path) -> None:
    """The ranks in tiktoken's format; which special tokens follow them is fixed in the code of all who read it."""
    ranked = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % tokenizer.ranks[token] for token in ranked))
