"""Rounding that looks at a matrix's inputs: what one column's rounding does to the outputs, those after it make up for.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". Scales
are those of plain rounding, but that errors weigh as much as their inputs are large, and are fixed before any column is
rounded; so columns can be rounded in any order, those with the largest inputs first.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.progress import track
from llama4.quantization.int4 import Int4, pack, quantize_groups

DAMPING = 0.01
"""What is added to the diagonal, of its mean, where there are more samples than inputs; and more where there are less:
then what rounding does to other inputs than these is not known."""
BLOCK = 128
"""Columns after which the rest of the matrix hears of their errors."""


class Hessian:
    """The second derivative of the squared error of a matrix's outputs by a row of it: the sum of x x^T over inputs."""

    def __init__(self, inputs: int) -> None:
        self.sum_II = torch.zeros(inputs, inputs)
        self.count = 0

    def add(self, x_NI: Tensor) -> None:
        """Samples of the inputs."""
        wide = x_NI.detach().float()
        self.sum_II.addmm_(wide.mT, wide)
        self.count += len(x_NI)

    def factor(self) -> tuple[Tensor, Tensor]:
        """The order of the columns, and U, upper triangular: U^T U is the inverse of the damped sum in that order."""
        diagonal = self.sum_II.diagonal()
        order = diagonal.argsort(descending=True)
        damping = DAMPING * max(1.0, len(diagonal) / max(1, self.count)) * float(diagonal.mean())
        damped = self.sum_II[order][:, order].double()
        damped.diagonal().add_(damping or 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return order, torch.linalg.cholesky(inverse, upper=True).float()


def quantize(weight_OI: Tensor, hessian: Hessian, format: Int4) -> dict[str, Tensor]:
    """The parts of a matrix as `Int4.quantize` gives them, with a smaller error of the outputs for such inputs."""
    size, W = format.group_size, weight_OI.float()
    importance = hessian.sum_II.diagonal().unflatten(0, (-1, size))
    _, scale = quantize_groups(weight_OI.unflatten(-1, (-1, size)), weight_OI.dtype, importance)
    order, U = hessian.factor()
    scales_OI = scale.float().squeeze(-1).repeat_interleave(size, dim=1)[:, order]
    W, values = W[:, order], torch.empty_like(weight_OI, dtype=torch.int8)
    for at in track(range(0, W.shape[1], BLOCK)):
        end = min(at + BLOCK, W.shape[1])
        errors = torch.empty(len(W), end - at)
        for i in range(at, end):
            value = (W[:, i] / scales_OI[:, i]).round_().clamp_(-8, 7)
            values[:, order[i]] = value.to(torch.int8)
            errors[:, i - at] = error = (W[:, i] - value * scales_OI[:, i]) / U[i, i]
            W[:, i:end].addr_(error, U[i, i:end], alpha=-1)
        W[:, end:].addmm_(errors, U[at:end, end:], alpha=-1)
    return {"weight_packed": pack(values), "weight_scale": scale.squeeze(-1).contiguous()}
