"""The routed experts of a layer, each applied to its own rows and to no others.

Shapes: R routed rows sorted by expert, D hidden size, E experts, F expert width; I inputs, O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.kernels import abi, cpu
from llama4.kernels.abi import Matrix
from llama4.kernels.triton import launch_products, support
from llama4.ops import cpu_kernels, gpu_kernels
from llama4.ops.linear import in_out_matrix, linear_in_out


def loop_over_experts(expert: Callable[[Tensor, int], Tensor], x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    """`expert(rows, i)` of every expert i that has rows, [R, D], in the order of the rows."""
    parts = x_RD.split(num_tokens_per_expert_E.tolist())
    return concat_experts([expert(part, i) for i, part in enumerate(parts) if len(part)], x_RD)


def product_of_each(x_RI: Tensor, num_tokens_per_expert_E: Tensor, weight_EIO: Tensor) -> Tensor:
    """Each row by the matrix of its expert, in x out, [R, O], expert by expert. The gradient of the matrices is one
    tensor for all of them."""
    parts, matrices = x_RI.split(num_tokens_per_expert_E.tolist()), weight_EIO.unbind()
    products = [linear_in_out(part, matrix) for part, matrix in zip(parts, matrices, strict=True) if len(part)]
    return torch.cat(products) if products else x_RI.new_zeros(0, weight_EIO.shape[2])


def product_of_all(x_RI: Tensor, num_tokens_per_expert_E: Tensor, weight_EIO: Tensor) -> Tensor:
    """The same in one call, by torch or on Hopper by a Triton kernel; the host does not wait for a GPU."""
    if gpu_unsupported_reason(x_RI, weight_EIO) is None:
        return launch_products.grouped_mm(x_RI, num_tokens_per_expert_E, weight_EIO)
    return F.grouped_mm(x_RI, weight_EIO, offs=num_tokens_per_expert_E.cumsum(0, dtype=torch.int32))


def gpu_unsupported_reason(x_RI: Tensor, weight_EIO: Tensor) -> str | None:
    """Why the Triton kernel does not multiply these; None if it does."""
    if reason := gpu_kernels.unsupported_reason(x_RI, weight_EIO):
        return reason
    if not x_RI.dtype == weight_EIO.dtype == torch.bfloat16:
        return "rows or matrices are not bfloat16"
    _, inputs, outputs = weight_EIO.shape
    if inputs % 64 or outputs % 8:
        return "the inputs are no multiple of 64, or the outputs none of 8"
    if not weight_EIO.is_contiguous():
        return "the matrices are not contiguous"
    return support.grouped_mm_unsupported_reason(x_RI.device)


def grouped_product(x_RI: Tensor, num_tokens_per_expert_E: Tensor, weight_EIO: Tensor) -> Tensor:
    """The same where torch has it, any sizes, and gradients: for many small matrices, such as those of adapters."""
    if x_RI.dtype not in GROUPED_DTYPES or (x_RI.is_cuda and x_RI.dtype != torch.bfloat16):
        return product_of_each(x_RI, num_tokens_per_expert_E, weight_EIO)
    _, inputs, outputs = weight_EIO.shape
    more_inputs, more_outputs = -inputs % GROUPED_MULTIPLE, -outputs % GROUPED_MULTIPLE
    if more_inputs or more_outputs:
        x_RI, weight_EIO = F.pad(x_RI, (0, more_inputs)), F.pad(weight_EIO, (0, more_outputs, 0, more_inputs))
    ends = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x_RI, weight_EIO, offs=ends)[:, :outputs]


GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED_MULTIPLE = 8
"""Of inputs and outputs: torch's grouped_mm wants rows of 16 bytes."""


def concat_experts(outputs: list[Tensor], x_RD: Tensor) -> Tensor:
    """The outputs of the experts that had rows, in the order of the rows."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs) if outputs else x_RD


def swiglu_experts(
    expert: Callable[[Tensor, int], Tensor],
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_up_EIO: Tensor,
    down_EIO: Tensor,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of every expert's rows, [R, D]: expert by expert, or on a CPU in one call.

    Args:
        expert: what expert i makes of its rows.
        x_RD: rows sorted by expert.
        num_tokens_per_expert_E: int64; they sum to R.
        gate_up_EIO: for the one call, the matrices of all experts, [E, D, 2F], gate first.
        down_EIO: [E, F, D].
    """
    gate_up, down = in_out_matrix(gate_up_EIO, x_RD.dtype), in_out_matrix(down_EIO, x_RD.dtype)
    return swiglu_matrices(expert, x_RD, num_tokens_per_expert_E, gate_up, down)


def swiglu_matrices(
    expert: Callable[[Tensor, int], Tensor],
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_up: Matrix | None,
    down: Matrix | None,
) -> Tensor:
    """The same for matrices in any layout, as they are described for the one call; None if it does not read them."""
    if gate_up is None or down is None or unsupported_reason(x_RD, gate_up, down):
        return loop_over_experts(expert, x_RD, num_tokens_per_expert_E)
    assert x_RD.shape[1] == gate_up.I == down.O and gate_up.O == 2 * down.I
    assert num_tokens_per_expert_E.dtype == torch.int64 and num_tokens_per_expert_E.sum() == len(x_RD)
    return cpu.experts(x_RD, num_tokens_per_expert_E, gate_up, down)


def unsupported_reason(x_RD: Tensor, *matrices: Matrix) -> str | None:
    """Why the compiled kernel does not take these; None if it does."""
    if not len(x_RD):
        return "there are no rows"
    for matrix in matrices:
        if matrix.I * matrix.O < cpu_kernels.MIN_MATRIX:
            return "the matrices are too small for a call to pay"
        if matrix.O % abi.STRIP:
            return f"the outputs are no multiple of {abi.STRIP}, in which many rows are computed"
    return cpu_kernels.unsupported_reason(x_RD)
