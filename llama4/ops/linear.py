"""Products with a matrix in a float dtype, each by the fastest right way for its device, dtype and number of rows.

| on a CPU, matrices of 2^18 numbers or more | few rows | more |
|---|---|---|
| out x in, float32 | `cpu` | oneDNN |
| out x in, bfloat16 | `cpu` | torch, which is oneDNN |
| in x out, as experts are | `cpu` | `cpu`: 1.3 to 2 times oneDNN with tens of rows, equal with hundreds |

Everything else (smaller matrices, other devices and dtypes, gradients, compiling) is torch's own product.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.kernels import abi, cpu


class Linear(nn.Linear):
    """torch's, with a faster forward."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., I] -> [..., O]."""
    if bias_O is None and x.ndim == 2:
        if cpu.takes_dense(x, weight_OI):
            return cpu.linear(x, weight_OI)
        if _is_for_onednn(x, weight_OI):
            return _onednn(x, weight_OI)
    return F.linear(x, weight_OI, bias_O)


def project(x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """x W, for matrices that are stored in x out, as experts are."""
    if cpu.takes_dense(x_NI, weight_IO, most=abi.MAX_GEMV_ROWS if weight_IO.shape[1] % abi.STRIP else None):
        return cpu.project(x_NI, weight_IO)
    if _is_for_onednn(x_NI, weight_IO):
        return _onednn(x_NI, weight_IO.mT)
    return x_NI @ weight_IO


def _is_for_onednn(x_NI: Tensor, weight: Tensor) -> bool:
    """torch sends float32 to MKL unless a global switch says otherwise; oneDNN is a fifth faster with many rows and
    twice as fast with tens of them, at the same precision."""
    return (
        x_NI.dtype == weight.dtype == torch.float32
        and x_NI.is_cpu
        and weight.numel() >= cpu.MIN_MATRIX
        and x_NI.shape[0] > 0
        and not (torch.is_grad_enabled() and (x_NI.requires_grad or weight.requires_grad))
        and torch.backends.mkldnn.is_available()
        and not torch.compiler.is_compiling()
    )


def _onednn(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")
    return out
