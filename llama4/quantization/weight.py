"""Matrices in few bits, as modules that multiply with them.

A packed weight stands where a Linear stood, or, as E matrices, inside `PackedExperts`; the model around does not know.
Its parameters are those of the format on disk, most often compressed-tensors, with experts stacked: a packed weight
loads from and saves to any checkpoint of its format, to the bit. Where a kernel wants an order of its own they lie in
that, from loading on, and `checkpoint_layout` gives what a checkpoint has. On a GPU the kernels of `gpu` multiply;
elsewhere, and where those do not run, `product` says how.

Shapes: N tokens, O outputs, I inputs, E experts, R rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from llama4.kernels.abi import Matrix
from llama4.kernels.triton import launch
from llama4.ops import quantized
from llama4.ops.linear import linear
from llama4.quantization.schemes import Format

NUMBERS = 1 << 20
"""Weights that are quantised at once: bounds the memory beside them."""
ROWS = 1024
"""Outputs that are dequantised at once."""


class PackedWeight(nn.Module):
    """y = x W^T, with W [O, I], or E of them, in a format of few bits.

    Args:
        format: of the numbers.
        shape: (O, I) or (E, O, I).
        bias: add a bias, which is not packed.
    """

    weight_scale: nn.Parameter
    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    """Parameters that hold the numbers; by default under the names of the compressed-tensors format."""

    def __init__(self, format: Format, shape: tuple[int, ...], *, bias: bool = False) -> None:
        super().__init__()
        self.format, self.shape = format, shape
        for name, (part_shape, dtype) in self.part_shapes(format, shape).items():
            self.register_parameter(name, nn.Parameter(torch.empty(part_shape, dtype=dtype), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(shape[-2])) if bias else None

    @classmethod
    def part_shapes(cls, format: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a matrix, or of several; scales may come in another float."""
        raise AssertionError("a format says")

    @classmethod
    def quantize(cls, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        """The parts of a matrix in this format, contiguous; scales have its dtype. A few rows at a time."""
        blocks = [cls.quantize_rows(rows, format) for rows in weight_OI.split(max(1, NUMBERS // weight_OI.shape[1]))]
        return {part: torch.cat([block[part] for block in blocks]).contiguous() for part in cls.parts}

    @classmethod
    def quantize_rows(cls, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        raise AssertionError("a format computes")

    def checkpoint_layout(self, part: str) -> Tensor:
        """A part as a checkpoint has it."""
        parameter: nn.Parameter = getattr(self, part)
        return parameter.detach()

    def for_cpu(self, part: str, values: Tensor) -> Tensor:
        """A part of a checkpoint as this module wants it to compute on a CPU: the same, or its numbers in another
        order, in a view of any shape. From then on it takes all its parts to lie so."""
        return values

    def as_stored(self) -> None:
        """Let parts lie as in a checkpoint again, for who computes elsewhere with them."""

    def dequantize(self, expert: int | None = None) -> Tensor:
        """The matrix [O, I] in the dtype of its scales."""
        raise AssertionError("a format computes")

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        """x W^T, [N, O], in the dtype of x."""
        raise AssertionError("a format computes")

    def matrix(self) -> Matrix | None:
        """For kernels of a CPU, as long as the parameters stay where they are; None if they do not read it, or would
        leave out its bias."""
        if self.format.kind not in quantized.KINDS or self.bias is not None:
            return None
        codes, (outputs, inputs) = getattr(self, self.parts[0]), self.shape[-2:]
        return quantized.matrix(
            self.format.kind, codes, self.weight_scale, outputs, inputs, self.format.group_size or 0
        )

    def on_gpu(self, x_RI: Tensor) -> bool:
        """Whether rows are for a kernel on a GPU."""
        return launch.takes(x_RI, self.format.kind, self.format.group_size or self.shape[-1])

    def grouped(self, x_RI: Tensor, counts_E: Tensor | None = None, expert: int | None = None) -> Tensor:
        """x W^T by a kernel on a GPU, [R, O]: of one matrix, or of all experts, for so many rows each, one after the
        other. The host does not wait."""
        codes = self._of(getattr(self, self.parts[0]), expert)
        return launch.product(self.format.kind, x_RI, codes, self._of(self.weight_scale, expert), counts_E)

    def forward(self, x: Tensor) -> Tensor:
        """As a Linear: [..., I] -> [..., O]."""
        y = self.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.shape[-2])
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves go through; casts reach the bias alone: the bits are what they are, and the scales belong to them."""
        for name, parameter in self.named_parameters(recurse=False):
            moved = fn(parameter.data)
            kept = moved if moved.dtype == parameter.dtype or name == "bias" else parameter.data.to(moved.device)
            self.register_parameter(name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        return self

    def extra_repr(self) -> str:
        return f"{self.format.kind}, {list(self.shape)}, group_size={self.format.group_size}"

    @staticmethod
    def _of(part: Tensor, expert: int | None) -> Tensor:
        return part if expert is None else part[expert]


def in_blocks(weight: Callable[[slice], Tensor], rows: int, x_NI: Tensor) -> Tensor:
    """x W^T where `weight` makes a few rows of W at a time: never a whole matrix."""
    blocks = [linear(x_NI, weight(slice(start, start + ROWS)).to(x_NI.dtype)) for start in range(0, rows, ROWS)]
    return torch.cat(blocks, dim=-1) if len(blocks) > 1 else blocks[0]


def not_zero(scale: Tensor) -> Tensor:
    """1 where all is zero, so that codes are zero and not undefined."""
    return torch.where(scale == 0, 1.0, scale)
