"""AdamW (Loshchilov & Hutter 2017) with float32 states whatever the parameters' dtype, and the learning rate over time.

A bfloat16 parameter would lose what one step adds to it in rounding: it is rounded up or down at random there, in
proportion, so that the mean of many steps is right (Gupta et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
BLOCK = 256
"""Numbers of an 8-bit state that have a scale in common."""
RUN = 4096 * BLOCK
"""Numbers that a step changes at a time: what it computes with is there for so many, not for a whole parameter."""
RUN_BYTES = 50
"""Of each of them, with states in 8 bits and bfloat16; others need less."""


class Float32State:
    """A state in float32, or in better where its parameter is."""

    parts = ("",)

    @staticmethod
    def new(parameter: Tensor) -> dict[str, Tensor]:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return {"": torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)}

    @staticmethod
    def read(parts: Mapping[str, Tensor], run: slice) -> Tensor:
        return parts[""].view(-1)[run]

    @staticmethod
    def write(parts: Mapping[str, Tensor], run: slice, x: Tensor, generator: torch.Generator) -> None:
        """It was changed in place."""


class Int8State:
    """A state in 8 bits: a sign, and 7 bits of the logarithm below the largest of a block of `BLOCK` numbers. A step is
    a factor of 2^(1/5), and numbers below 2^-25 of the largest are zero.

    What is added in one step of Adam is less than a step of this scale. So a number is rounded up or down at random, in
    proportion, and the mean of many roundings is right (as in `round_at_random`); blocks as in Dettmers et al. 2022,
    "8-bit Optimizers via Block-wise Quantization". A run begins at a block.
    """

    parts = ("", "_scale")
    steps_per_octave = 5
    dtype, lowest, levels = torch.int8, 0, 127

    @classmethod
    def new(cls, parameter: Tensor) -> dict[str, Tensor]:
        blocks = math.ceil(parameter.numel() / BLOCK)
        values = torch.zeros(parameter.numel(), dtype=cls.dtype, device=parameter.device)
        return {"": values, "_scale": torch.zeros(blocks, device=parameter.device)}

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], run: slice) -> Tensor:
        stored, scale = parts[""][run], parts["_scale"][_blocks(run)]
        values = F.pad(stored, (0, -len(stored) % BLOCK)).view(-1, BLOCK).float()
        x = values.sign() * torch.exp2((values.abs() - cls.levels) / cls.steps_per_octave) * scale[:, None]
        return x.flatten()[: len(stored)]

    @classmethod
    def write(cls, parts: Mapping[str, Tensor], run: slice, x: Tensor, generator: torch.Generator) -> None:
        blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True)
        share = (blocks.abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
        lower = (cls.levels + cls.steps_per_octave * share.log2()).floor().clamp(min=cls.lowest)
        below = torch.where(lower > 0, torch.exp2((lower - cls.levels) / cls.steps_per_octave), 0.0)
        above = torch.exp2((lower + 1 - cls.levels) / cls.steps_per_octave)
        noise = torch.rand(share.shape, generator=generator).to(share.device)
        level = (lower + (noise < (share - below) / (above - below))).clamp(max=cls.levels)
        parts[""][run] = torch.where(blocks < 0, -level, level).flatten()[: len(x)].to(cls.dtype)
        parts["_scale"][_blocks(run)] = scale[:, 0]


class UInt8State(Int8State):
    """A state without signs in 8 bits of the logarithm, 51 octaves. None is zero beside others that are not: Adam
    divides by its root, and a mean whose square was rounded to nothing would go thousands of steps at once. Of a mean
    there are 25 octaves, so its square is always there."""

    dtype, lowest, levels = torch.uint8, 1, 255


def _blocks(run: slice) -> slice:
    """Of a run of numbers, its blocks."""
    return slice(run.start // BLOCK, math.ceil(run.stop / BLOCK))


State = type[Float32State] | type[Int8State]
STATES: dict[str, dict[str, State]] = {
    "float32": {"mean": Float32State, "square": Float32State},
    "int8": {"mean": Int8State, "square": UInt8State},
}
"""How the means of gradients and of their squares are kept."""


class AdamW:
    """One step for all parameters at a time.

    Args:
        parameters: by name.
        weight_decay: share of a matrix that goes in a step of learning rate 1; vectors keep theirs.
        seed: of the rounding of bfloat16 and of 8-bit states.
        states: a key of `STATES`.

    Attributes:
        steps: taken so far.
        state: `mean` and `square` of each parameter's gradients, in float32 or in parts.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, weight_decay: float = 0.0, seed: int = 0, states: str = "float32"
    ) -> None:
        self.parameters = dict(parameters)
        self.weight_decay = weight_decay
        self.steps = 0
        self._kinds = STATES[states]
        self.state = {
            f"{name}.{which}{part}": tensor
            for name, parameter in self.parameters.items()
            for which, kind in self._kinds.items()
            for part, tensor in kind.new(parameter).items()
        }
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Change every parameter that has a gradient, and forget the gradients."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient, parameter.grad = parameter.grad.reshape(-1), None
            flat = parameter.detach().reshape(-1)
            decay = learning_rate * self.weight_decay if parameter.ndim > 1 else 0.0
            for begin in range(0, len(flat), RUN):
                run = slice(begin, min(begin + RUN, len(flat)))
                self._change(name, run, flat[run], gradient[run], learning_rate, decay)
            if flat.data_ptr() != parameter.data_ptr():  # it is not contiguous
                parameter.copy_(flat.view(parameter.shape))

    def _change(
        self, name: str, run: slice, values: Tensor, gradient: Tensor, learning_rate: float, decay: float
    ) -> None:
        """A run of a parameter's numbers."""
        gradient = gradient.to(torch.promote_types(values.dtype, torch.float32))
        mean = self._update(name, "mean", run, lambda x: x.lerp_(gradient, 1 - BETAS[0]))
        square = self._update(
            name, "square", run, lambda x: x.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        )
        size = (square.sqrt() / math.sqrt(1 - BETAS[1] ** self.steps)).add_(EPS)
        wide = values.to(mean.dtype)  # itself, if it is as wide
        if decay:
            wide.mul_(1 - decay)
        wide.addcdiv_(mean, size, value=-learning_rate / (1 - BETAS[0] ** self.steps))
        if wide is not values:
            values.copy_(round_at_random(wide, values.dtype, self.generator))

    def _update(self, name: str, which: str, run: slice, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Read a run of a state, change it and keep it."""
        kind = self._kinds[which]
        parts = {part: self.state[f"{name}.{which}{part}"] for part in kind.parts}
        x = change(kind.read(parts, run))
        kind.write(parts, run, x, self.generator)
        return x

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
