"""Teachers: a model that is asked with each batch, or what one said of each token, in a file.

A distribution over 202,048 tokens is nearly all in a few of them. The file has the `top` likeliest of each token that
is learnt, and the rest as one: the divergence of both is never more than that of the whole distributions.

Shapes: N packed tokens, n those of them that are learnt, k likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.api import Llama4
from llama4.errors import ArgumentError, CheckpointError, ConfigError
from llama4.files import user_path, writes
from llama4.ops.openmp import passive_waiting
from llama4.progress import Bar
from llama4.reading import parse_json
from llama4.train.data import Batch, Batches, Dataset, load_dataset
from llama4.train.loss import IGNORED, Losses, tokens_per_slice
from llama4.train.memory import available_bytes
from llama4.train.objectives import Teacher, hidden_states
from llama4.units import bytes_text
from llama4.weights.safetensors import SafetensorsFiles, write_tensors

SUFFIX = ".safetensors"
"""Of a file of likeliest tokens; other names are those of models."""
_ROUNDING = 1e-3
"""By which probabilities of a token may sum to more or less than 1."""
_IDS, _LOG_PROBS, _REST, _LENGTHS, _ABOUT = "token_ids", "log_probs", "log_rest", "lengths", "about"


class ModelTeacher:
    """A model. Its logits of a slice are there beside the student's."""

    def __init__(self, llm: Llama4) -> None:
        self._model = llm.model

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._model.parameters(), *self._model.buffers()))

    def forward_bytes(self, tokens: int) -> int:
        return round(tokens * self._model.config.text.activation_bytes(self._model.dtype.itemsize))

    def divergences(self, batch: Batch) -> Losses:
        head = self._model.language_model.lm_head
        with torch.no_grad():
            hidden_ND, _, labels_N = hidden_states(self._model, batch)
        hidden_nD = hidden_ND[labels_N != IGNORED]

        def losses(logits_nV: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                target_nV = head(hidden_nD[rows]).to(logits_nV).log_softmax(-1)
            return F.kl_div(logits_nV.log_softmax(-1), target_nV, log_target=True, reduction="none").sum(-1)

        return losses


class SavedTeacher:
    """A file that `save_teacher` wrote.

    Raises:
        CheckpointError: no such file, or a damaged one.
        ArgumentError: it was made of other data, or with another length or other tokens to learn.
    """

    def __init__(self, path: str | Path, data: Dataset, vocab_size: int) -> None:
        path = user_path(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is not there; write it with `llama4 teach`")
        files = SafetensorsFiles(path.parent, {path.name: None})
        tensors = _read(path, files, vocab_size)
        about = _about(path, tensors[_ABOUT])
        if about.get("data") != data.digest:
            raise ArgumentError(f"{path} is of another file than {data.path}; run `llama4 teach` on this one")
        lengths = [example.num_learnt for example in data.examples]
        if lengths != tensors[_LENGTHS].tolist() or sum(lengths) != len(tensors[_IDS]):
            raise ArgumentError(
                f"{path} is of the same data, but of other tokens; run `llama4 teach` with this max_length and learn"
            )
        begins = [0, *tensors[_LENGTHS].cumsum(0).tolist()]
        self._rows = {example.line: slice(*begins[i : i + 2]) for i, example in enumerate(data.examples)}
        self._ids, self._log_probs, self._rest = (tensors[name] for name in (_IDS, _LOG_PROBS, _REST))

    @property
    def num_bytes(self) -> int:
        return self._ids.nbytes + self._log_probs.nbytes + self._rest.nbytes

    def forward_bytes(self, tokens: int) -> int:
        return 0

    def divergences(self, batch: Batch) -> Losses:
        places = [self._rows[line] for line in batch.lines]
        device = batch.input_ids.device
        ids_nk, log_p_nk, rest_n = (
            torch.cat([tensor[place] for place in places]).to(device)
            for tensor in (self._ids, self._log_probs, self._rest)
        )
        ids_nk = ids_nk.long()

        def losses(logits_nV: Tensor, rows: slice) -> Tensor:
            log_q_nV = logits_nV.log_softmax(-1)
            top_nk, q_rest_n = split_off(log_q_nV, ids_nk[rows].to(log_q_nV.device))
            p_nk, p_rest_n = log_p_nk[rows].to(log_q_nV), rest_n[rows].to(log_q_nV)
            return (p_nk.exp() * (p_nk - top_nk)).sum(-1) + p_rest_n.exp() * (p_rest_n - q_rest_n)

        return losses


def split_off(log_probs_nV: Tensor, ids_nk: Tensor) -> tuple[Tensor, Tensor]:
    """The log probabilities of some tokens [n, k], and that of all others together [n]."""
    others_nV = log_probs_nV.scatter(-1, ids_nk, -torch.inf)
    return log_probs_nV.gather(-1, ids_nk), others_nV.logsumexp(-1)


def load_teacher(name: str, student: Llama4, data: Dataset, progress: bool = True, **reading: object) -> Teacher:
    """A file of likeliest tokens, or a model on the student's device.

    Args:
        data: what the student learns from.
        reading: how it was read, see `load_dataset`.

    Raises:
        Llama4Error: it cannot be loaded; or the data are other tokens to it, or were when the file was written.
    """
    vocabulary = student.config.text.vocab_size
    if name.endswith(SUFFIX):
        return SavedTeacher(name, data, vocabulary)
    llm = Llama4.from_pretrained(name, device=student.model.device, progress=progress)
    if llm.config.text.vocab_size != vocabulary:
        raise ArgumentError(
            f"teacher {name} has a vocabulary of {llm.config.text.vocab_size} and the model one of {vocabulary}; both "
            "must have the same tokenizer"
        )
    theirs = load_dataset(data.path, llm.processor, progress=progress, **reading)  # type: ignore[arg-type]
    for ours, other in zip(data.examples, theirs.examples, strict=False):
        if ours.ids != other.ids:
            raise ArgumentError(
                f"line {ours.line} of {data.path} is other tokens to teacher {name} than to the model; both must have "
                "the same tokenizer, template and picture tokens"
            )
    return ModelTeacher(llm)


@passive_waiting()
def save_teacher(llm: Llama4, data: Dataset, output: str | Path, *, top: int = 32, batch_tokens: int = 4096) -> int:
    """Write what a model says of each token that is learnt: the `top` likeliest, and all others as one.

    Args:
        llm: the teacher.
        data: as `load_dataset` reads it for the student.
        output: a file, `.safetensors`; it appears complete, or what it held stays.
        top: k.
        batch_tokens: most tokens of a batch.

    Returns:
        How many tokens.

    Raises:
        ArgumentError: a name without the suffix, a `top` that cannot be, or takes more memory than there is; or
            preferences.
        DiskError: the file cannot be written.
    """
    output, vocabulary = user_path(output), llm.config.text.vocab_size
    if output.suffix != SUFFIX:
        raise ArgumentError(f"{output} is no name of a file of logits; let it end in {SUFFIX}")
    if not 1 <= top < vocabulary:
        raise ArgumentError(f"top is {top}; it must be from 1 to {vocabulary - 1}, this vocabulary less one")
    if data.rejected:
        raise ArgumentError(f"{data.path} holds preferences; a teacher is asked about replies")
    lengths = [example.num_learnt for example in data.examples]
    n, about = sum(lengths), json.dumps({"data": data.digest, "top": top}).encode()
    needed, free = n * (8 * top + 4), available_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise ArgumentError(
            f"the {top} likeliest of {n} tokens take {bytes_text(needed)}, and {bytes_text(free)} are free; lower top"
        )
    with writes(output):  # before the teacher is asked for hours
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))
    tensors = {
        _IDS: torch.empty(n, top, dtype=torch.int32),
        _LOG_PROBS: torch.empty(n, top),
        _REST: torch.empty(n),
        _LENGTHS: torch.tensor(lengths),
        _ABOUT: torch.frombuffer(bytearray(about), dtype=torch.uint8),
    }
    head, at, size = llm.model.language_model.lm_head, 0, tokens_per_slice(vocabulary)
    batches = Batches(data.examples, llm.processor, batch_tokens, None)
    with torch.no_grad(), Bar("asking the teacher", n, "tokens", shown=llm.progress) as bar:
        for batch in batches:
            hidden_ND, _, labels_N = hidden_states(llm.model, batch)
            for hidden_nD in hidden_ND[labels_N != IGNORED].split(size):
                log_probs_nV = head(hidden_nD).float().log_softmax(-1)
                ids_nk = log_probs_nV.topk(top).indices
                end = at + len(ids_nk)
                tensors[_IDS][at:end] = ids_nk
                tensors[_LOG_PROBS][at:end], tensors[_REST][at:end] = split_off(log_probs_nV, ids_nk)
                bar.advance(end - at)
                at = end
    write_tensors(output, tensors)
    return n


def _read(path: Path, files: SafetensorsFiles, vocab_size: int) -> dict[str, Tensor]:
    """Raises:
    CheckpointError: tensors of other names, dtypes or shapes, tokens beyond the vocabulary, or no probabilities.
    """
    wanted = {
        _IDS: (torch.int32, 2),
        _LOG_PROBS: (torch.float32, 2),
        _REST: (torch.float32, 1),
        _LENGTHS: (torch.int64, 1),
        _ABOUT: (torch.uint8, 1),
    }
    there = {name: (files.spec(name).dtype, len(files.spec(name).shape)) for name in files.names()}
    if there != wanted:
        raise CheckpointError(f"{path} is no file that `llama4 teach` wrote; write it again", wanted.keys() - there)
    tensors = {name: files.read(name) for name in wanted}
    if not tensors[_IDS].shape == tensors[_LOG_PROBS].shape == (len(tensors[_REST]), tensors[_IDS].shape[1]):
        raise CheckpointError(f"{path} has tensors of different lengths; write it again with `llama4 teach`")
    ids_nk = tensors[_IDS]
    if len(ids_nk) and not 0 <= int(ids_nk.min()) <= int(ids_nk.max()) < vocab_size:
        raise CheckpointError(f"{path} has tokens beyond the vocabulary of {vocab_size}; it is of another model")
    finite = all(bool(tensors[name].isfinite().all()) for name in (_LOG_PROBS, _REST))
    sums_n = tensors[_LOG_PROBS].exp().sum(-1) + tensors[_REST].exp()
    if not finite or not ((sums_n - 1).abs() < _ROUNDING).all():
        raise CheckpointError(f"{path} has probabilities that are none; write it again with `llama4 teach`")
    return tensors


def _about(path: Path, text: Tensor) -> Mapping[str, object]:
    try:
        return parse_json(text.numpy().tobytes(), path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
