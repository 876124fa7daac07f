"""What a batch's loss is: of the next token, of a preference, or of a teacher's distribution.

An objective is called with a model, a batch and how much of the run is done, and gives the loss of all that counts in
the batch as one sum, with how many that is: batches of different sizes are weighed by it.

Shapes: N packed tokens, n of them, B rows, P pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.adapters.lora import Adapter
from llama4.cache.batch import Batch as Packed
from llama4.model.multimodal import Llama4Model
from llama4.train.data import Batch
from llama4.train.loss import IGNORED, Losses, cross_entropy, sliced_sum, token_log_probs, tokens_per_slice


@dataclass(frozen=True)
class Loss:
    """Of a batch.

    Attributes:
        total: sum over what counts, with gradients.
        count: how many tokens, or pairs, that is.
        values: other sums over them that are reported.
    """

    total: Tensor
    count: int
    values: Mapping[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What is made small."""

    def __call__(self, model: Llama4Model, batch: Batch, done: float) -> Loss:
        """Args:
        done: share of the run's steps that were taken, from 0 to 1.
        """


def head_parameters(head: nn.Module) -> list[Tensor]:
    """What is trained of the head: its own, and that of an adapter that hangs on it."""
    modules = [head, *(hook for hook in head._forward_hooks.values() if isinstance(hook, nn.Module))]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def hidden_states(model: Llama4Model, batch: Batch) -> tuple[Tensor, Packed, Tensor]:
    """What goes into the head [N, D], how it is packed, and the labels [N]."""
    hidden_ND, packed = model.hidden_states(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        image_grids=batch.image_grids,
    )
    return hidden_ND, packed, packed.pack(batch.labels.to(hidden_ND.device))


def batch_loss(model: Llama4Model, batch: Batch) -> Tensor:
    """The sum of the cross-entropy over the tokens that are learnt."""
    hidden_ND, _, labels_N = hidden_states(model, batch)
    head = model.language_model.lm_head
    slice_size = tokens_per_slice(model.config.text.vocab_size)
    return cross_entropy(hidden_ND, labels_N, head, trained=head_parameters(head), slice_size=slice_size)


def next_token(model: Llama4Model, batch: Batch, done: float = 0.0) -> Loss:
    """The cross-entropy of each token that is learnt."""
    return Loss(batch_loss(model, batch), batch.num_learnt)


# -- preferences -------------------------------------------------------------------------------------------------------


def _sigmoid_loss(ratios_B: Tensor, lengths_B: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * (log ratio of the chosen - that of the rejected)) (Rafailov et al. 2023, equation 7)."""
    chosen_P, rejected_P = ratios_B.chunk(2)
    return -F.logsigmoid(beta * (chosen_P - rejected_P))


def _ipo_loss(ratios_B: Tensor, lengths_B: Tensor, beta: float) -> Tensor:
    """(difference of the log ratios - 1 / (2 beta))^2, each ratio a mean over its tokens (Azar et al. 2023, equation
    17; the mean is in none of its equations, but how its authors computed it, and how TRL does)."""
    chosen_P, rejected_P = (ratios_B / lengths_B).chunk(2)
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


PREFERENCE_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"sigmoid": _sigmoid_loss, "ipo": _ipo_loss}
"""log(p / p of the reference) of each row [2 P], the chosen ones first, and their lengths -> losses [P]."""


@dataclass(frozen=True)
class Preference:
    """Direct preference optimization. The reference is the model without the adapter, so it takes no memory.

    Of the values, `margin` is the mean of beta * (log ratio of the chosen - of the rejected), and `accuracy` the share
    of pairs in which it is above 0.
    """

    adapter: Adapter
    beta: float
    loss: str

    def __call__(self, model: Llama4Model, batch: Batch, done: float = 0.0) -> Loss:
        with torch.no_grad(), self.adapter.detached(model):
            reference_B = reply_log_probs(model, batch)
        ratios_B = reply_log_probs(model, batch) - reference_B
        lengths_B = batch.is_learnt.sum(1).to(ratios_B.device)
        losses_P = PREFERENCE_LOSSES[self.loss](ratios_B, lengths_B, self.beta)
        chosen_P, rejected_P = (self.beta * ratios_B.detach()).chunk(2)
        margin_P = chosen_P - rejected_P
        values = {
            "chosen_reward": chosen_P.sum().item(),
            "rejected_reward": rejected_P.sum().item(),
            "margin": margin_P.sum().item(),
            "accuracy": (margin_P > 0).sum().item(),
        }
        return Loss(losses_P.sum(), len(losses_P), values)


def reply_log_probs(model: Llama4Model, batch: Batch) -> Tensor:
    """The log probability of what is learnt of each row, [B], in float32 or better."""
    hidden_ND, packed, labels_N = hidden_states(model, batch)
    slice_size = tokens_per_slice(model.config.text.vocab_size)
    found_N = token_log_probs(hidden_ND, labels_N, model.language_model.lm_head, slice_size=slice_size)
    return packed.unpack(found_N).sum(1)


# -- teachers ----------------------------------------------------------------------------------------------------------


class Teacher(Protocol):
    """Who knows the distribution of the next token."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""

    def forward_bytes(self, tokens: int) -> int:
        """What it computes with, for so many tokens."""

    def divergences(self, batch: Batch) -> Losses:
        """The Kullback-Leibler divergence of a student's distribution from the teacher's, of each token of a batch that
        is learnt."""


@dataclass(frozen=True)
class Distillation:
    """w * divergence from the teacher + (1 - w) * cross-entropy (Hinton et al. 2015), where w falls in a line from
    `weight` to 0 while the model learns: at first the teacher's whole distribution counts, at last what the data say.

    Of the values, `divergence` and `cross_entropy` are the means of both.
    """

    teacher: Teacher
    weight: float

    def __call__(self, model: Llama4Model, batch: Batch, done: float) -> Loss:
        w = self.weight * (1 - done)
        if not w:
            return next_token(model, batch)
        hidden_ND, _, labels_N = hidden_states(model, batch)
        kept = labels_N != IGNORED
        labels_n, divergences = labels_N[kept], self.teacher.divergences(batch)
        sums = {"divergence": 0.0, "cross_entropy": 0.0}

        def losses(logits_nV: Tensor, rows: slice) -> Tensor:
            soft_n = divergences(logits_nV, rows)
            hard_n = F.cross_entropy(logits_nV, labels_n[rows], reduction="none")
            sums["divergence"] += soft_n.detach().sum().item()
            sums["cross_entropy"] += hard_n.detach().sum().item()
            return w * soft_n + (1 - w) * hard_n

        head = model.language_model.lm_head
        slice_size = tokens_per_slice(2 * model.config.text.vocab_size)  # the teacher's logits are there, too
        total = sliced_sum(hidden_ND[kept], head, losses, trained=head_parameters(head), slice_size=slice_size)
        return Loss(total, len(labels_n), sums)
