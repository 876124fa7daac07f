"""Products with a matrix in a float dtype, each by the fastest exact way for its device, dtype and number of rows.

On a CPU matrices go through the compiled kernels; with more than a few rows, if their outputs fill whole strips. With
hundreds of rows these are as fast as oneDNN, with tens of them up to 1.5 times slower (out x in) or 2 times faster (in
x out); and they leave no threads of OpenMP behind, which spin on cores that the next kernel wants.
Other matrices in float32 go through oneDNN. In training, so do both products with a matrix that is not trained itself,
as an adapter's base is: rows and gradients, in float32. Everything else (smaller matrices, other devices and dtypes,
matrices that are trained, torch.compile) is torch's own product.

Shapes: N rows, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.kernels import abi, cpu
from llama4.kernels.abi import Matrix, MatrixLayout
from llama4.ops import cpu_kernels
from llama4.ops.frozen import frozen_product
from llama4.ops.swiglu import swiglu


class Linear(nn.Linear):
    """torch's, with a faster forward."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """Takes a Linear's place, and may know a faster way together with what stands beside or before it."""

    def together(self, modules: Sequence[nn.Module], x_NI: Tensor) -> list[Tensor] | None:
        """What these modules, of which it is the first, make of the same rows; None if only one by one."""
        return None

    def of_swiglu(self, gate_NI: Tensor, up_NI: Tensor) -> Tensor | None:
        """What it makes of silu(gate) * up; None if only one after the other."""
        return None


def linears(modules: Sequence[nn.Module], x_NI: Tensor) -> list[Tensor]:
    """What several Linears make of the same rows, [N, O] each."""
    first = modules[0]
    outputs = first.together(modules, x_NI) if isinstance(first, PackedLinear) else None
    return [module(x_NI) for module in modules] if outputs is None else outputs


def linear_of_swiglu(module: nn.Module, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """What a Linear makes of silu(gate) * up, [N, O]."""
    out_NO = module.of_swiglu(gate_NI, up_NI) if isinstance(module, PackedLinear) else None
    return module(swiglu(gate_NI, up_NI)) if out_NO is None else out_NO


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., I] -> [..., O]."""
    if bias_O is not None or x.ndim != 2:
        return F.linear(x, weight_OI, bias_O)
    if is_frozen(x, weight_OI):
        return _frozen_product(x, weight_OI)
    if _takes_rows(x, outputs=len(weight_OI)) and not unsupported_reason(x, weight_OI):
        return cpu.linear(x, weight_OI)
    if not onednn_unsupported_reason(x, weight_OI):
        return _onednn(x, weight_OI)
    return F.linear(x, weight_OI)


def linear_of_tower(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., I] -> [..., O]: in bfloat16, on a CPU without instructions for it, by the compiled kernels.
    They are three times as fast there as torch's product."""
    rows_NI = x.reshape(-1, x.shape[-1])
    if (
        x.dtype != torch.bfloat16
        or not _takes_rows(rows_NI, outputs=len(weight_OI))
        or unsupported_reason(rows_NI, weight_OI)
        or cpu_kernels.has_bfloat16_instructions()
    ):
        return F.linear(x, weight_OI, bias_O)
    y = cpu.linear(rows_NI, weight_OI).reshape(*x.shape[:-1], len(weight_OI))
    return y if bias_O is None else y.add_(bias_O)


def linear_in_out(x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """x W, [N, O], for matrices that are stored in x out, as experts are."""
    if is_frozen(x_NI, weight_IO):
        return _frozen_product(x_NI, weight_IO.mT)
    if _takes_rows(x_NI, outputs=weight_IO.shape[1]) and not unsupported_reason(x_NI, weight_IO):
        return cpu.linear_in_out(x_NI, weight_IO)
    if not onednn_unsupported_reason(x_NI, weight_IO):
        return _onednn(x_NI, weight_IO.mT)
    return x_NI @ weight_IO


def _takes_rows(x_NI: Tensor, outputs: int) -> bool:
    """Whether the compiled kernels take so many rows: more than a few are computed in strips of outputs."""
    return len(x_NI) <= abi.MAX_GEMV_ROWS or outputs % abi.STRIP == 0


def unsupported_reason(x_NI: Tensor, weight: Tensor) -> str | None:
    """Why the compiled kernels do not multiply these, in either layout; None if they do."""
    if weight.numel() < cpu_kernels.MIN_MATRIX:
        return "the matrix is too small for a call to pay"
    if not len(x_NI):
        return "there are no rows"
    if reason := cpu_kernels.unsupported_reason(x_NI):
        return reason
    if x_NI.shape[1] % _row_multiple(x_NI.dtype):
        return f"the inputs are no multiple of {_row_multiple(x_NI.dtype)}"
    return matrix_unsupported_reason(weight, x_NI.dtype)


def matrix_unsupported_reason(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels do not read a matrix, or those of several experts, for rows of a dtype; None if they
    do."""
    if weight.dtype != dtype:
        return "the matrix has another dtype than the rows"
    if not weight.is_contiguous():
        return "the matrix is not contiguous"
    if reason := cpu_kernels.unsupported_reason(weight):
        return reason
    if weight.shape[-1] % _row_multiple(dtype):
        return f"rows of the matrix are no multiple of {_row_multiple(dtype)}"
    return None


def in_out_unsupported_reason(weight_EIO: Tensor, dtype: torch.dtype) -> str | None:
    """The same of the matrices of a layer's experts, in x out."""
    if weight_EIO.shape[1] % abi.LANES:
        return f"its inputs are no multiple of {abi.LANES}"
    return matrix_unsupported_reason(weight_EIO, dtype)


def _row_multiple(dtype: torch.dtype) -> int:
    return abi.INPUTS[abi.DTYPES[dtype]]


def out_in_matrix(weight_OI: Tensor, dtype: torch.dtype) -> Matrix | None:
    """The description of a matrix for kernels that take several of them; None if they do not read it."""
    if matrix_unsupported_reason(weight_OI, dtype):
        return None
    outputs, inputs = weight_OI.shape
    return Matrix(w=weight_OI.data_ptr(), layout=MatrixLayout.OUT_IN, I=inputs, O=outputs)


def in_out_matrix(weight_EIO: Tensor, dtype: torch.dtype) -> Matrix | None:
    """The same of a layer's experts, in x out."""
    _, inputs, outputs = weight_EIO.shape
    if in_out_unsupported_reason(weight_EIO, dtype):
        return None
    stride = inputs * outputs * weight_EIO.element_size()
    return Matrix(w=weight_EIO.data_ptr(), layout=MatrixLayout.IN_OUT, I=inputs, O=outputs, stride=stride)


def onednn_unsupported_reason(x_NI: Tensor, weight: Tensor) -> str | None:
    """Why a product is not for oneDNN; None if it is. torch sends float32 to MKL unless a global switch says
    otherwise; oneDNN is a fifth faster with many rows and twice as fast with tens of them, at the same precision."""
    if torch.is_grad_enabled() and (x_NI.requires_grad or weight.requires_grad):
        return "a tensor needs a gradient"
    return _onednn_product_unsupported_reason(x_NI, weight)


def is_frozen(x_NI: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the product and the gradient of the rows, since the matrix needs none."""
    if not (torch.is_grad_enabled() and x_NI.requires_grad) or weight.requires_grad:
        return False
    return _onednn_product_unsupported_reason(x_NI, weight) is None


def _onednn_product_unsupported_reason(x_NI: Tensor, weight: Tensor) -> str | None:
    if not x_NI.dtype == weight.dtype == torch.float32:
        return "only float32 is slower elsewhere"
    if not (x_NI.is_cpu and torch.backends.mkldnn.is_available()):
        return "it is not there"
    if not len(x_NI) or weight.numel() < cpu_kernels.MIN_MATRIX:
        return "the product is too small for it to pay"
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    return None


def _onednn(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """For each number of rows that it meets, oneDNN compiles code, in a millisecond, and keeps it, up to a megabyte. An
    expert has another number in every batch; so between two powers of two there are at most sixteen."""
    N = len(x_NI)
    more = -N % max(8, (1 << N.bit_length()) >> 5)
    x_NI = F.pad(x_NI, (0, 0, 0, more)) if more else x_NI
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")
    return out[:N]


def _frozen_product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return frozen_product(
        x_NI,
        lambda x_NI: _onednn(x_NI.contiguous(), weight_OI),
        lambda dy_NO: _frozen_product(dy_NO, weight_OI.mT),
    )
