"""The gated activation of feed-forward layers (Shazeer 2020).

Shapes: N tokens, F width of the MLP.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llama4.kernels import cpu
from llama4.kernels.triton import launch_elementwise
from llama4.ops import cpu_kernels, gpu_kernels


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) * up. Both may be halves of one tensor."""
    if unsupported_reason(gate_NF, up_NF) is None:
        return cpu.swiglu(gate_NF, up_NF)
    if gpu_unsupported_reason(gate_NF, up_NF) is None:
        return launch_elementwise.swiglu(gate_NF, up_NF)
    return F.silu(gate_NF) * up_NF


def unsupported_reason(gate_NF: Tensor, up_NF: Tensor) -> str | None:
    """Why the compiled kernel does not take these; None if it does."""
    if gate_NF.ndim != 2:
        return "gate and up have more dimensions than two"
    if gate_NF.dtype != up_NF.dtype:
        return "gate and up have different dtypes"
    return cpu_kernels.elementwise_unsupported_reason(gate_NF.shape[1], gate_NF, up_NF)


def gpu_unsupported_reason(gate_NF: Tensor, up_NF: Tensor) -> str | None:
    """Why the Triton kernel does not take these; None if it does."""
    if gate_NF.ndim != 2:
        return "gate and up have more dimensions than two"
    if gate_NF.dtype != up_NF.dtype:
        return "gate and up have different dtypes"
    return gpu_kernels.unsupported_reason(gate_NF, up_NF)
