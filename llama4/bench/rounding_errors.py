"""The rounding error of quantized matrices of several distributions, beside that of plain rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4.bench.absmax_rounding import round_to_absmax
from llama4.quantization.fp8 import Fp8
from llama4.quantization.int4 import Int4
from llama4.quantization.int8 import Int8
from llama4.quantization.weight import QuantizedWeight, WeightFormat

Errors = dict[str, dict[str, tuple[float, float]]]
"""Distribution -> format -> norm of the error over norm of the matrix: of this library, of plain rounding."""


def distributions() -> dict[str, Tensor]:
    """Matrices [512, 1024] with distributions like those of trained weights, in bfloat16; always the same."""
    outputs, inputs, generator = 512, 1024, torch.Generator().manual_seed(0)
    normal = torch.randn(outputs, inputs, generator=generator)
    chi_squared = torch.randn(4, outputs, inputs, generator=generator).square().sum(0)
    outlier = torch.rand(outputs, inputs, generator=generator) < 1 / 256
    wide_row = torch.rand(outputs, 1, generator=generator) < 1 / 16
    matrices = {
        "normal": normal,
        "Student's t, 4 degrees": normal / (chi_squared / 4).sqrt(),
        "normal, 1 of 256 ten times": normal * torch.where(outlier, 10, 1),
        "the same in 1 row of 16": normal * torch.where(outlier & wide_row, 10, 1),
    }
    return {name: matrix.bfloat16() for name, matrix in matrices.items()}


def measure() -> Errors:
    formats = {
        "int4, 128": Int4(128),
        "int4, 32": Int4(32),
        "int8": Int8(),
        "fp8": Fp8(),
    }
    return {
        name: {
            label: (_error(matrix, format, plain=False), _error(matrix, format, plain=True))
            for label, format in formats.items()
        }
        for name, matrix in distributions().items()
    }


def _error(weight_OI: Tensor, format: WeightFormat, plain: bool) -> float:
    module = QuantizedWeight.of(weight_OI, format)
    if plain:
        module.set_parts(round_to_absmax(weight_OI, format))
    return ((module.dequantize().float() - weight_OI.float()).norm() / weight_OI.float().norm()).item()


def table(errors: Errors) -> str:
    """The errors as lines of text."""
    formats = next(iter(errors.values()))
    lines = [f"{'error of weights':<28}" + "".join(f"{name:>12}{'plain':>9}" for name in formats)]
    for name, row in errors.items():
        lines.append(f"{name:<28}" + "".join(f"{ours:>12.2%}{plain:>9.2%}" for ours, plain in row.values()))
    return "\n".join(lines)
