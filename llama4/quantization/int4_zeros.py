"""Int4 with zero points: sixteen levels per weight, and per group of inputs a scale and the level that is zero.

Blocks hold all of that side by side, and are read by the kernels of GGUF's: those whose groups have a minimum, which
here is a whole number of steps. Files of AWQ, of GPTQ and of compressed-tensors have the parts apart.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama4.quantization.gguf_blocks import GgufBlocks, nibbles
from llama4.quantization.int4 import pack
from llama4.quantization.weight import Shape, TensorSpec

SCALES = (torch.float16, torch.bfloat16)
"""Dtypes of scales that a block holds exactly."""


@dataclass(frozen=True)
class Int4Zeros(GgufBlocks):
    """A block is a float32 whose lowest byte is the zero point, and 32 values from 0 to 15, as those of Q4_1. A scale
    keeps 16 significant bits, so none of float16 or bfloat16 is rounded, nor any weight in float32.

    Attributes:
        group_size: inputs with one scale and zero point in files, a multiple of 32.
        scale_dtype: of the scales in files.
    """

    kind = "int4_zeros"
    bits = 4
    nbytes = 20
    parts = ("weight_packed",)
    compressed_name = "pack-quantized"

    scale_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"int4, a scale and a zero point per {self.group_size} weights"

    def to_compressed(self) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": self.group_size}
        return {"weights": weights | {"dynamic": False}, "input_activations": None}

    def _decode(self, blocks: Tensor) -> Tensor:
        head = blocks[..., :4].contiguous().view(torch.int32)
        return (head & ~255).view(torch.float32) * (nibbles(blocks[..., 4:]) - (head & 255)).float()

    def encode(self, values_OI: Tensor, zeros_OG: Tensor, scales_OG: Tensor) -> Tensor:
        """Values and zero points from 0 to 15, uint8 -> rows of blocks [O, bytes]."""
        heads_OG = scales_OG.float().contiguous().view(torch.int32) | zeros_OG
        heads = heads_OG.repeat_interleave(values_OI.shape[1] // 32 // heads_OG.shape[1], dim=1)
        low, high = values_OI.unflatten(-1, (-1, 2, 16)).unbind(-2)
        return torch.cat((heads[..., None].view(torch.uint8), low | high << 4), dim=-1).flatten(1)

    def compressed_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        """The tensors that compressed-tensors has for a matrix [O, I]."""
        outputs, inputs = shape
        groups = inputs // self.group_size
        return {
            "weight_packed": TensorSpec((outputs, inputs // 8), torch.int32),
            "weight_scale": TensorSpec((outputs, groups), self.scale_dtype),
            "weight_zero_point": TensorSpec((-(-outputs // 8), groups), torch.int32),
            "weight_shape": TensorSpec((2,), torch.int64),
        }

    def to_compressed_parts(self, stored: Tensor) -> dict[str, Tensor]:
        """Rows of blocks as those tensors."""
        blocks = stored.unflatten(-1, (-1, self.nbytes))
        values_OI = nibbles(blocks[..., 4:]).flatten(1)
        heads_OG = blocks[:, :: self.group_size // self.block, :4].contiguous().view(torch.int32).squeeze(-1)
        zeros_GO = F.pad((heads_OG.mT & 255) - 8, (0, -len(stored) % 8))
        return {
            "weight_packed": pack((values_OI - 8).view(torch.int8)),
            "weight_scale": (heads_OG & ~255).view(torch.float32).to(self.scale_dtype),
            "weight_zero_point": pack(zeros_GO.to(torch.int8, memory_format=torch.contiguous_format)).mT,
            "weight_shape": torch.tensor(values_OI.shape),
        }
