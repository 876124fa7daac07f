"""A checkpoint that was just converted against its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.families import family_of
from llama4.families.names import EMBEDDING, HEAD
from llama4.progress import Bar, track
from llama4.quantization.modules import swap_modules
from llama4.text.tokenizer import Tokenizer
from llama4.weights import memory
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.load import load
from llama4.weights.source import Source

SAMPLE = "Zürich’s 3 rivers:\n\n  the Limmat, the Sihl & 1,000 brooks 🌊"
MAX_PARAMETERS = 1_000_000_000
"""Of a model of which logits are computed, too."""


def verify(
    directory: Path, source: Source, config: Llama4Config, tokenizer: Tokenizer | None, *, progress: bool = False
) -> None:
    """See that a directory holds the model it was made from.

    Compared are the ids of all special tokens and of a text, and each tensor bit by bit, as both sides give it to the
    model: one of each is in memory at a time, so this takes as long as reading both files. That the configuration comes
    back is checked when it is written. Of a model below `MAX_PARAMETERS` the logits of a short prompt are compared as
    well; of a larger one they follow from all that.

    Raises:
        CheckpointError: what differs.
    """
    written_config, written = open_checkpoint(directory)
    # Without a tokenizer nothing in Meta's layout says which token is the image's.
    says_image = config.vision is not None and tokenizer is not None
    if says_image and written_config.image_token_index != config.image_token_index:
        raise _different(
            f"image_token_index is {written_config.image_token_index}, in its source {config.image_token_index}"
        )
    if tokenizer is not None:
        _compare_tokenizers(tokenizer, family_of(config).load_tokenizer(directory, written_config))
    tied = {HEAD: EMBEDDING} if config.text.tie_word_embeddings else {}
    names = set(source.names())
    if lost := sorted(names - set(written.names())):
        raise _different("tensors of its source are missing", lost)
    different = []
    sizes = {name: written.spec(name).nbytes for name in written.names()}
    with Bar("checking", sum(sizes.values()), "bytes", shown=progress) as bar:
        for name, size in sizes.items():
            with bar.step(size):
                if not _has_same(written, name, source, name if name in names else tied.get(name, name)):
                    different.append(name)
    if different:
        raise _different(f"{len(different)} tensors are not those of its source, the first is {different[0]}")
    if config.num_parameters() <= MAX_PARAMETERS:
        ids = torch.tensor([_prompt(tokenizer, config)])
        dtype = getattr(torch, config.dtype)  # files may have matrices in one and vectors in another
        if not _is_same(_logits(written_config, written, ids, dtype), _logits(config, source, ids, dtype)):
            raise _different("logits are others than those of its source")


def _compare_tokenizers(source: Tokenizer, written: Tokenizer | None) -> None:
    if written is None:
        raise _different("there is no tokenizer")
    moved = [name for name, i in source.special_tokens.items() if written.special_tokens.get(name) != i]
    if moved or source.encode(SAMPLE) != written.encode(SAMPLE):
        what = f"{moved[0]} and {len(moved) - 1} more special tokens have" if moved else "ordinary text has"
        raise _different(f"{what} other ids than in its source")


def _different(what: str, missing: Sequence[str] = ()) -> CheckpointError:
    return CheckpointError(f"in the converted checkpoint {what}; nothing is kept of it", missing)


def _has_same(written: Source, name: str, source: Source, its_name: str) -> bool:
    """Whether two checkpoints have the same tensor; neither stays in memory."""
    ours, theirs = written.read(name), source.read(its_name)
    is_same = _is_same(ours, theirs)
    for side, tensor, read in ((written, ours, name), (source, theirs, its_name)):
        if side.is_mapped(read):
            memory.release(tensor)
    return is_same


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, so that NaN is NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pieces = zip(*(memory.in_pieces(tensor.view(bits[tensor.itemsize])) for tensor in (a, b)), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in track(list(pieces)))


def _prompt(tokenizer: Tokenizer | None, config: Llama4Config) -> list[int]:
    if tokenizer is None:
        return list(range(min(32, config.text.vocab_size)))
    return [*sorted(tokenizer.special_tokens.values())[:16], *tokenizer.encode(SAMPLE)]


def _logits(config: Llama4Config, source: Source, ids: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.device("meta"):
        model = family_of(config).build(config)
    swap_modules(model, source.plan)
    load(
        model, source, dtype=dtype, memory_map=False
    )  # the same order in memory on both sides, and so the same rounding
    with torch.inference_mode():
        logits: Tensor = model.eval()(ids)
    return logits
