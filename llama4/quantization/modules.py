"""Packed weights in the place of a model's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama4.experts import joined
from llama4.layers import swiglu
from llama4.quantization.fp8 import Fp8Weight
from llama4.quantization.int4 import Int4Weight
from llama4.quantization.int8 import Int8Weight
from llama4.quantization.packed import PackedWeight
from llama4.quantization.schemes import Plan

PACKED: dict[str, type[PackedWeight]] = {"int4": Int4Weight, "int8": Int8Weight, "fp8": Fp8Weight}
"""Kind of format -> module."""


class PackedExperts(nn.Module):
    """The routed experts over packed weights: one after the other, those that nobody chose are not touched."""

    gate_up_proj: PackedWeight
    down_proj: PackedWeight

    def forward(self, x_ND: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """See `Experts.forward`."""
        outputs, start = [], 0
        for expert, count in enumerate(num_tokens_per_expert_E.tolist()):
            if count:
                gate_up_n2F = self.gate_up_proj.product(x_ND[start : start + count], expert)
                outputs.append(self.down_proj.product(swiglu(*gate_up_n2F.chunk(2, dim=-1)), expert))
                start += count
        return joined(outputs, x_ND)


def swap_modules(model: nn.Module, plan: Plan) -> None:
    """Put packed weights, not filled yet, where a plan wants them; the model is on the meta device.

    Raises:
        ValueError: one of the two matrices of a layer's experts is to be quantised and the other is not.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, format in plan.items():
        path, _, leaf = name.rpartition(".")
        shape = shapes[name]
        if leaf == "weight":
            owner, _, leaf = path.rpartition(".")
            parent = model.get_submodule(owner)
        else:
            shape = (shape[0], shape[2], shape[1])  # experts are in x out unless packed
            parent = model.get_submodule(path)
            if not isinstance(parent, PackedExperts):
                if missing := [p for p in ("gate_up_proj", "down_proj") if f"{path}.{p}" not in plan]:
                    raise ValueError(
                        f"{name} is quantised and {path}.{missing[0]} is not; experts are whole or not at all"
                    )
                owner, _, experts = path.rpartition(".")
                parent = PackedExperts()
                setattr(model.get_submodule(owner), experts, parent)
        with torch.device("meta"):
            setattr(parent, leaf, PACKED[format.kind](format, shape))
