"""What every Triton kernel between matrix products asks of its tensors. Such a kernel has no gradient, so nothing that
is trained uses one."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.kernels.triton import support


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why the kernels do not take these tensors, whatever the operation; None if they do. That they do not run on a GPU
    is logged once."""
    for tensor in tensors:
        if not tensor.is_cuda:
            return "a tensor is not on a GPU"
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    is_training = torch.is_grad_enabled()
    for tensor in tensors:
        if is_training and tensor.requires_grad:
            return "a tensor needs a gradient"
        if reason := support.unsupported_reason(tensor.device, tensor.dtype):
            return reason
    return None
