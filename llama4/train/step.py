"""One batch: its loss, its gradients, and what the routers did with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4.model.multimodal import Llama4Model
from llama4.train.data import Batch, Batches
from llama4.train.loss import RouterWatch
from llama4.train.objectives import Objective, next_token


@dataclass(frozen=True)
class Learnt:
    """What a batch gave.

    Attributes:
        loss: the mean of what counts in it: tokens that are learnt, or pairs.
        router_loss: weighted balance loss and z-loss; 0 without.
        loads: for each layer with experts, the tokens that each expert got.
        values: other means that the objective reports.
    """

    loss: float
    router_loss: float
    loads: dict[str, Tensor]
    values: Mapping[str, float]


def learn(
    model: Llama4Model,
    batch: Batch,
    objective: Objective = next_token,
    done: float = 0.0,
    *,
    balance: float = 0.0,
    z_loss: float = 0.0,
) -> Learnt:
    """Add a batch's gradients to those of the parameters that are trained."""
    with RouterWatch(model) as watch:
        found = objective(model, batch, done)
        count = max(1, found.count)
        loss = found.total / count
        total, router_loss = loss, None
        if balance or z_loss:
            router_loss = watch.losses(balance=balance, z_loss=z_loss)
            total = loss if router_loss is None else loss + router_loss
        total.backward()
    values = {name: value / count for name, value in found.values.items()}
    return Learnt(loss.item(), router_loss.item() if router_loss is not None else 0.0, watch.loads, values)


@torch.no_grad()
def evaluate(model: Llama4Model, batches: Batches, objective: Objective = next_token) -> dict[str, float]:
    """The means of one epoch over all that counts: `loss`, and what else the objective reports, at the run's end."""
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        found = objective(model, batch, 1.0)
        for name, value in {"loss": found.total.item(), **found.values}.items():
            sums[name] = sums.get(name, 0.0) + value
        count += found.count
    return {name: value / max(1, count) for name, value in sums.items()}
