"""AdamW (Loshchilov & Hutter 2017) with float32 states whatever the parameters' dtype, and the learning rate over time.

A bfloat16 parameter would lose what one step adds to it in rounding: it is rounded up or down at random there, in
proportion, so that the mean of many steps is right (Gupta et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8


class AdamW:
    """One step for all parameters at a time.

    Args:
        parameters: by name.
        weight_decay: share of a matrix that goes in a step of learning rate 1; vectors keep theirs.
        seed: of the rounding of bfloat16.

    Attributes:
        steps: taken so far.
        state: `mean` and `square` of each parameter's gradients, float32.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, weight_decay: float = 0.0, seed: int = 0) -> None:
        self.parameters = dict(parameters)
        self.weight_decay = weight_decay
        self.steps = 0
        self.state = {
            f"{name}.{kind}": torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for name, parameter in self.parameters.items()
            for kind in ("mean", "square")
        }
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Change every parameter that has a gradient, and forget the gradients."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            mean, square = self.state[f"{name}.mean"], self.state[f"{name}.square"]
            gradient = parameter.grad.to(mean.dtype)
            parameter.grad = None
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = (square.sqrt() / math.sqrt(1 - BETAS[1] ** self.steps)).add_(EPS)
            rate = learning_rate / (1 - BETAS[0] ** self.steps)
            if parameter.dtype == mean.dtype:
                if self.weight_decay and parameter.ndim > 1:
                    parameter.mul_(1 - learning_rate * self.weight_decay)
                parameter.addcdiv_(mean, size, value=-rate)
                continue
            wide = parameter.to(mean.dtype)
            if self.weight_decay and parameter.ndim > 1:
                wide.mul_(1 - learning_rate * self.weight_decay)
            parameter.copy_(round_at_random(wide.addcdiv_(mean, size, value=-rate), parameter.dtype, self.generator))

    def clip(self, largest: float) -> float:
        """Scale all gradients down to a norm of at most `largest`; -> the norm that they had. 0 leaves them."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = total_norm(gradients)
        if 0 < largest < norm:
            for gradient in gradients:
                gradient.mul_(largest / (norm + 1e-6))
        return norm

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Of all numbers together, in float32 or better."""
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def round_at_random(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours, the nearer one more often; other dtypes to the nearest."""
    if dtype != torch.bfloat16 or x.dtype != torch.float32:
        return x.to(dtype)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, generator=generator).to(x.device)
    bits = (x.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(dtype)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""Share of the steps after the warmup that are done -> share of the learning rate."""


def learning_rate_at(step: int, steps: int, peak: float, schedule: str, warmup: int) -> float:
    """Of a step, from 0: up from 0 in a line for `warmup` steps, then as the schedule says. As transformers has it."""
    if step < warmup:
        return peak * step / warmup
    return peak * SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
