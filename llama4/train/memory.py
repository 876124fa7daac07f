"""What a run takes beyond the loaded model, before it starts.

Activations that the backward pass needs grow in a line with the tokens of a batch, as attention keeps no scores. So
they are counted, not guessed: two small forwards are run, what autograd keeps of each is added up, and the line through
both is followed to the batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llama4.cache.batch import make_batch
from llama4.control_groups import available_memory
from llama4.errors import Llama4Error
from llama4.model.multimodal import Llama4Model
from llama4.quantization.weight import QuantizedWeight
from llama4.train.loss import MAX_LOGIT_BYTES
from llama4.train.objectives import Teacher, head_parameters
from llama4.train.optimizer import BLOCK, RUN, RUN_BYTES
from llama4.units import bytes_text
from llama4.vision.encoder import run

PROBES = (64, 192)
"""Tokens of the two forwards."""
PROBED_IDS = 97
"""Below the size of any vocabulary, and different, so that the tokens go to different experts."""
STATE_BYTES = {"float32": 4.0, "int8": 1 + 4 / BLOCK}
"""Of a number of the optimizer's states."""


CODE_BYTES = 1 << 19
"""Of the code that oneDNN keeps for a product, with a matrix of one shape and one number of rows (ops/linear.py)."""
MAX_EXPERT_ROWS = 64
"""Of those numbers, how many experts have in the long run."""


@dataclass(frozen=True)
class Estimate:
    """Bytes beyond the loaded model, the adapter included.

    Attributes:
        trained: what is trained, if that is not the model itself; its gradients and the optimizer's states.
        activations: what is kept of the largest batch for its backward pass, and code that oneDNN keeps.
        logits: of a slice, with their gradients; beside a teacher's.
        layer: with gradient checkpointing, a layer's activations, computed again, and their gradients.
        step: what the optimizer computes with, after the backward pass.
        teacher: a teacher, which is loaded already.
        teacher_layer: what it computes with, while the batch's activations are kept.
    """

    trained: int
    activations: int
    logits: int
    layer: int = 0
    step: int = 0
    teacher: int = 0
    teacher_layer: int = 0

    @property
    def to_come(self) -> int:
        return self.trained + max(self.activations + max(self.logits, self.layer, self.teacher_layer), self.step)

    @property
    def total(self) -> int:
        return self.to_come + self.teacher

    def __str__(self) -> str:
        teacher = f"{bytes_text(self.teacher)} for the teacher, " if self.teacher else ""
        beside = {"of logits": self.logits, "in a layer": self.layer, "in the teacher": self.teacher_layer}
        most = max(beside, key=lambda name: beside[name])
        return (
            f"{bytes_text(self.total)} beyond the model: {teacher}{bytes_text(self.trained)} for what is trained, "
            f"{bytes_text(self.activations)} of activations and {bytes_text(beside[most])} {most}, or "
            f"{bytes_text(self.step)} in the optimizer's step"
        )


@dataclass
class Kept:
    """Bytes that autograd keeps of a forward.

    Attributes:
        outside: of all layers.
        layers: within each, what goes into it not counted.
        inputs: what goes into them, together.
        head: what the head gets, and its gradient.
    """

    outside: int = 0
    layers: list[int] = field(default_factory=list)
    inputs: int = 0
    head: int = 0

    def total(self, recomputed: bool) -> int:
        """All; or with gradient checkpointing, of the layers what goes in."""
        return self.outside + (self.inputs if recomputed else sum(self.layers)) + self.head

    def layer(self, recomputed: bool) -> int:
        """With gradient checkpointing, the activations of a layer and their gradients."""
        return 2 * max(self.layers, default=0) if recomputed else 0


def estimate(
    model: Llama4Model,
    trained: Mapping[str, Tensor],
    tokens: int,
    optimizer_states: str = "float32",
    teacher: Teacher | None = None,
    recomputed: bool = False,
) -> Estimate:
    """For the largest batch of so many tokens; the model computes with what is trained.

    Args:
        trained: parameters, by name.
        optimizer_states: see `TrainingOptions`.
        teacher: its activations and its logits are there beside the model's.
        recomputed: with gradient checkpointing.
    """
    own = {parameter.data_ptr() for parameter in model.parameters()}
    states = sum(
        trained_bytes(p.numel(), p.itemsize, optimizer_states, is_added=p.data_ptr() not in own)
        for p in trained.values()
    )
    small, large = (kept_bytes(model, trained, probe) for probe in PROBES)
    activations = along_line(small.total(recomputed), large.total(recomputed), tokens) + code_bytes(model, trained)
    layer = along_line(small.layer(recomputed), large.layer(recomputed), tokens)
    head = sum(parameter.numel() for parameter in head_parameters(model.language_model.lm_head))
    logits = logit_bytes(model.config.text.vocab_size, tokens, head, has_teacher=teacher is not None)
    largest = max((parameter.numel() for parameter in trained.values()), default=0)
    found = Estimate(round(states), activations, logits, layer, step_bytes(largest))
    if teacher is None:
        return found
    return replace(found, teacher=teacher.num_bytes, teacher_layer=teacher.forward_bytes(tokens))


def trained_bytes(numbers: int, size: int, optimizer_states: str, is_added: bool) -> float:
    """Of parameters of `size` bytes a number: their gradients and the optimizer's states, and if they are added to the
    model, themselves."""
    return numbers * (2 * STATE_BYTES[optimizer_states] + size * (1 + is_added))


def code_bytes(model: Llama4Model, trained: Mapping[str, Tensor]) -> int:
    """What oneDNN keeps of products in float32 with matrices that are not trained, forward and backward."""
    changed, counts = {parameter.data_ptr() for parameter in trained.values()}, Counter[tuple[int, ...]]()
    modules = (module for module in model.language_model.modules() if not isinstance(module, QuantizedWeight))
    for parameter in (parameter for module in modules for parameter in module.parameters(recurse=False)):
        is_frozen = parameter.ndim > 1 and parameter.data_ptr() not in changed
        if is_frozen and parameter.is_cpu and parameter.dtype == torch.float32:
            counts[tuple(parameter.shape)] += math.prod(parameter.shape[:-2])
    of_experts = [min(count, MAX_EXPERT_ROWS) for shape, count in counts.items() if len(shape) > 2]
    of_others = sum(len(shape) == 2 for shape in counts)
    return 2 * CODE_BYTES * (sum(of_experts) + of_others)


def logit_bytes(vocab_size: int, tokens: int, head: int = 0, has_teacher: bool = False) -> int:
    """Of a slice of so many tokens at most: logits, their probabilities and gradients, beside a teacher's; and of
    `head`, numbers of the head that are trained, the gradients, which are summed in float32 over the slices."""
    sets = 2 if has_teacher else 1
    return 3 * sets * min(MAX_LOGIT_BYTES // sets, tokens * vocab_size * 4) + 4 * head


def step_bytes(largest: int) -> int:
    """What the optimizer's step computes with, if the largest parameter has so many numbers."""
    return RUN_BYTES * min(RUN, largest)


def along_line(small: float, large: float, tokens: int) -> int:
    """What grows in a line with the tokens, from what it is at the two `PROBES`."""
    per_token = max(0.0, (large - small) / (PROBES[1] - PROBES[0]))
    return round(max(small, large + per_token * (tokens - PROBES[1])))


def kept_bytes(model: Llama4Model, trained: Mapping[str, Tensor], tokens: int) -> Kept:
    """Of a forward of so many tokens, without gradient checkpointing."""
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *trained.values())}
    storages: dict[int, torch.UntypedStorage] = {}
    kept, decoder = Kept(), model.language_model.model

    def pack(tensor: Tensor) -> None:  # nothing goes backward; a node that got its own output here would never be freed
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no other gets its address

    def num_bytes() -> int:
        return sum(storage.nbytes() for storage in storages.values())

    def run_counted(layer: nn.Module, x_ND: Tensor, *inputs: Any) -> Tensor:
        before = num_bytes()
        out_ND = run(layer, x_ND, *inputs)
        kept.layers.append(num_bytes() - before)
        kept.inputs += x_ND.nbytes
        return out_ND

    ids_N = torch.arange(tokens, device=model.device) % PROBED_IDS
    before, decoder.run_layer = decoder.run_layer, run_counted
    try:
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            hidden_ND = decoder(decoder.embed_tokens(ids_N), make_batch(1, tokens, model.device), None)
    finally:
        decoder.run_layer = before
    kept.outside, kept.head = num_bytes() - sum(kept.layers), 2 * hidden_ND.nbytes
    return kept


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = available_memory()
    return int(free) if free < math.inf else None


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
