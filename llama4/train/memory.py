"""What a run takes beyond the loaded model, before it starts.

Activations that the backward pass needs grow in a line with the tokens of a batch, as attention keeps no scores. So
they are counted, not guessed: two small forwards are run, what autograd keeps of each is added up, and the line through
both is followed to the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama4.errors import Llama4Error
from llama4.model.multimodal import Llama4Model
from llama4.train.data import Batch
from llama4.train.loss import MAX_LOGIT_BYTES
from llama4.train.objectives import batch_loss
from llama4.train.optimizer import BLOCK, RUN, RUN_BYTES
from llama4.units import bytes_text

PROBES = (64, 192)
"""Tokens of the two forwards."""
STATE_BYTES = {"float32": 4.0, "int8": 1 + 4 / BLOCK}
"""Of a number of the optimizer's states."""


@dataclass(frozen=True)
class Estimate:
    """Bytes beyond the loaded model, the adapter included.

    Attributes:
        trained: what is trained, if that is not the model itself; its gradients and the optimizer's states.
        activations: what the backward pass of the largest batch needs.
        logits: of a slice, with their gradients; beside a teacher's.
        step: what the optimizer computes with, after the backward pass.
        teacher: a teacher, which is loaded already.
    """

    trained: int
    activations: int
    logits: int
    step: int = 0
    teacher: int = 0

    @property
    def to_come(self) -> int:
        return self.trained + max(self.activations + self.logits, self.step)

    @property
    def total(self) -> int:
        return self.to_come + self.teacher

    def __str__(self) -> str:
        teacher = f"{bytes_text(self.teacher)} for the teacher, " if self.teacher else ""
        return (
            f"{bytes_text(self.total)} beyond the model: {teacher}{bytes_text(self.trained)} for what is trained, "
            f"{bytes_text(self.activations)} of activations and {bytes_text(self.logits)} of logits, or "
            f"{bytes_text(self.step)} in the optimizer's step"
        )


def estimate(
    model: Llama4Model,
    trained: Mapping[str, Tensor],
    tokens: int,
    optimizer_states: str = "float32",
    teacher_bytes: int | None = None,
) -> Estimate:
    """For the largest batch of so many tokens; the model computes with what is trained.

    Args:
        trained: parameters, by name.
        optimizer_states: see `TrainingOptions`.
        teacher_bytes: of a teacher, whose logits are there beside the model's.
    """
    own = {parameter.data_ptr() for parameter in model.parameters()}
    states = 0.0
    for parameter in trained.values():
        states += (
            2 * STATE_BYTES[optimizer_states] * parameter.numel()
            + parameter.nbytes
            + (0 if parameter.data_ptr() in own else parameter.nbytes)
        )
    small, large = (_kept(model, trained, probe) for probe in PROBES)
    per_token = max(0.0, (large - small) / (PROBES[1] - PROBES[0]))
    activations = round(max(small, large + per_token * (tokens - PROBES[1])))
    vocabulary = model.config.text.vocab_size
    sets = 1 if teacher_bytes is None else 2
    logits = 3 * sets * min(MAX_LOGIT_BYTES // sets, tokens * vocabulary * 4)
    step = RUN_BYTES * min(RUN, max((parameter.numel() for parameter in trained.values()), default=0))
    return Estimate(round(states), activations, logits, step, teacher_bytes or 0)


def _kept(model: Llama4Model, trained: Mapping[str, Tensor], tokens: int) -> int:
    """Bytes that autograd keeps of a forward."""
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *trained.values())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    ids = torch.arange(tokens)[None] % min(model.config.text.vocab_size, 97)
    batch = Batch(ids, torch.ones_like(ids), ids, None, ())
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_loss(model, batch)
    return sum(storage.nbytes() for storage in storages.values())


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def check_memory(needed: Estimate, device: torch.device) -> None:
    """Raises:
    Llama4Error: what is to come is not free on the device; with what would take less.
    """
    free = available_bytes(device)
    if free is not None and needed.to_come > free:
        raise Llama4Error(
            f"training takes {needed}, and {bytes_text(free)} are free; take fewer batch_tokens, a smaller rank, "
            "gradient_checkpointing, or method 'qlora'"
        )
