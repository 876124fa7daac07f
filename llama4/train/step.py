"""One batch: its loss, its gradients, and what the routers did with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama4.model.multimodal import Llama4Model
from llama4.train.data import Batch, Batches
from llama4.train.loss import RouterWatch, cross_entropy, tokens_per_slice


@dataclass(frozen=True)
class Learnt:
    """What a batch gave.

    Attributes:
        loss: mean cross-entropy of the tokens that are learnt.
        router_loss: weighted balance loss and z-loss; 0 without.
        loads: for each layer with experts, the tokens that each expert got.
    """

    loss: float
    router_loss: float
    loads: dict[str, Tensor]


def head_parameters(head: nn.Module) -> list[Tensor]:
    """What is trained of the head: its own, and that of an adapter that hangs on it."""
    modules = [head, *(hook for hook in head._forward_hooks.values() if isinstance(hook, nn.Module))]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def batch_loss(model: Llama4Model, batch: Batch) -> Tensor:
    """The sum of the cross-entropy over the tokens that are learnt."""
    hidden_ND, packed = model.hidden_states(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        image_grids=batch.image_grids,
    )
    head = model.language_model.lm_head
    return cross_entropy(
        hidden_ND,
        packed.pack(batch.labels.to(hidden_ND.device)),
        head,
        trained=head_parameters(head),
        slice_size=tokens_per_slice(model.config.text.vocab_size),
    )


def learn(model: Llama4Model, batch: Batch, *, balance: float = 0.0, z_loss: float = 0.0) -> Learnt:
    """Add a batch's gradients to those of the parameters that are trained."""
    with RouterWatch(model) as watch:
        loss = batch_loss(model, batch) / max(1, batch.num_learnt)
        total, router_loss = loss, None
        if balance or z_loss:
            router_loss = watch.losses(balance=balance, z_loss=z_loss)
            total = loss if router_loss is None else loss + router_loss
        total.backward()
    return Learnt(loss.item(), router_loss.item() if router_loss is not None else 0.0, watch.loads)


@torch.no_grad()
def evaluate(model: Llama4Model, batches: Batches) -> float:
    """The mean cross-entropy of all tokens of one epoch that are to be predicted."""
    total, count = 0.0, 0
    for batch in batches:
        total += batch_loss(model, batch).item()
        count += batch.num_learnt
    return total / max(1, count)
