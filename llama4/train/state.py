"""What a run needs to go on as if it had never stopped: one file, replaced in one step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4.errors import CheckpointError, ConfigError
from llama4.files import writes
from llama4.model.multimodal import Llama4Model
from llama4.reading import MAX_INT, parse_json
from llama4.train.optimizer import AdamW
from llama4.weights.model_source import ModelSource
from llama4.weights.safetensors import SafetensorsFiles, write_tensors

STATE_FILE = "training.state"
_PARAMETER, _OPTIMIZER, _RANDOM, _ABOUT = "parameter:", "optimizer:", "random:", "about"


def save_state(directory: Path, optimizer: AdamW, about: Mapping[str, Any]) -> None:
    """Write parameters, the optimizer's states, the random states, and what else there is to know, as JSON.

    Raises:
        DiskError: it cannot be written; the state that is there stays.
    """
    tensors = {_PARAMETER + name: parameter for name, parameter in optimizer.parameters.items()}
    tensors |= {_OPTIMIZER + name: tensor for name, tensor in optimizer.state.items()}
    tensors |= {_RANDOM + "torch": torch.get_rng_state(), _RANDOM + "rounding": optimizer.generator.get_state()}
    if torch.cuda.is_available():
        tensors[_RANDOM + "cuda"] = torch.cuda.get_rng_state()
    text = json.dumps({**about, "optimizer_steps": optimizer.steps}).encode()
    tensors[_ABOUT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with writes(directory / STATE_FILE):
        directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / STATE_FILE, tensors)


def fingerprint(model: Llama4Model, trained: Collection[str]) -> str:
    """Of the first rows of what a state does not hold of a base model: what is not trained. It is the same in float32
    and bfloat16 and on every device; of a model in float16 it is another."""
    source = ModelSource(model)
    digest = hashlib.sha256()
    for name in sorted(set(source.names()) - set(trained)):
        rows = source.first_rows(name)
        if rows.is_floating_point() and rows.itemsize > 1:
            rows = rows.to(torch.bfloat16)
        digest.update(f"{name} {tuple(source.spec(name).shape)}".encode())
        digest.update(rows.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_about(directory: Path) -> dict[str, Any]:
    """What `save_state` was told.

    Raises:
        CheckpointError: there is no state, or a damaged one.
    """
    if not (directory / STATE_FILE).is_file():
        raise CheckpointError(f"{directory} has no {STATE_FILE} to resume from; start without resuming")
    path, files = directory / STATE_FILE, SafetensorsFiles(directory, {STATE_FILE: None})
    if _ABOUT not in files.names() or files.spec(_ABOUT).dtype != torch.uint8:
        raise CheckpointError(f"{path} is no state of training; start anew")
    try:
        about = parse_json(files.read(_ABOUT).numpy().tobytes(), path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    counts, best = (about.get(name) for name in ("step", "optimizer_steps")), about.get("best")
    is_best = best is None or (type(best) in (int, float) and abs(best) < MAX_INT)
    if not all(type(count) is int and 0 <= count <= MAX_INT for count in counts) or not is_best:
        raise CheckpointError(f"{path} is no state of training: its steps or its best loss are no numbers; start anew")
    return about


def load_state(directory: Path, optimizer: AdamW, idle: tuple[str, ...] = ()) -> None:
    """Put everything back where it was.

    Args:
        idle: beginnings of names that are left where they are: earlier versions wrote what had no gradient, too.

    Raises:
        CheckpointError: a state of another model or adapter.
    """
    files = SafetensorsFiles(directory, {STATE_FILE: None})
    wanted: dict[str, Tensor] = {_PARAMETER + name: tensor for name, tensor in optimizer.parameters.items()}
    wanted |= {_OPTIMIZER + name: tensor for name, tensor in optimizer.state.items()}
    left = tuple(kind + name for kind in (_PARAMETER, _OPTIMIZER) for name in idle)
    there = {n for n in files.names() if n.startswith((_PARAMETER, _OPTIMIZER)) and not n.startswith(left)}
    shapes = [
        (name, files.spec(name).shape, tuple(tensor.shape))
        for name, tensor in wanted.items()
        if name in there and files.spec(name).shape != tuple(tensor.shape)
    ]
    if there != wanted.keys() or shapes:
        raise CheckpointError(
            f"{directory / STATE_FILE} is of another model or adapter; resume with the same options",
            wanted.keys() - there,
            there - wanted.keys(),
            shapes,
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(files.read(name))
    optimizer.steps = int(read_about(directory)["optimizer_steps"])
    try:
        torch.set_rng_state(files.read(_RANDOM + "torch").clone())
        optimizer.generator.set_state(files.read(_RANDOM + "rounding").clone())
        if torch.cuda.is_available() and _RANDOM + "cuda" in files.names():
            torch.cuda.set_rng_state(files.read(_RANDOM + "cuda").clone())
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{directory / STATE_FILE} has no states of random numbers ({error}); start anew"
        ) from None
