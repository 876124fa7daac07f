"""Matrices whose groups are no runs of inputs, as GPTQ makes them in the order of activations (`desc_act`).

With the inputs sorted by their groups, a matrix is as any other: W x = W[:, order] x[order]. Its format has that order
(`WeightFormat.order`), which is for computing alone: a checkpoint that is written has such matrices dequantized, as
current versions of compressed-tensors have no form for them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from llama4.progress import track
from llama4.quantization.weight import ROWS, QuantizedWeight, Shape, WeightFormat
from llama4.weights import memory
from llama4.weights.computed import Computed, ComputedSource
from llama4.weights.source import Source

logger = logging.getLogger(__name__)


def order_by_groups(group_of: Tensor, groups: int) -> Tensor | None:
    """The inputs sorted by their groups, [I], int32; None if not all groups have the same size.

    Args:
        group_of: each input's group, [I].
        groups: how many there are.
    """
    group_of = group_of.flatten().long()
    if not groups or len(group_of) % groups or group_of.min() < 0 or group_of.max() >= groups:
        return None
    is_even = (group_of.bincount(minlength=groups) == len(group_of) // groups).all()
    return group_of.argsort(stable=True).int() if is_even else None


def without_orders(source: Source, dtype: torch.dtype) -> Source:
    """A checkpoint to be written: matrices with an order of inputs dequantized."""
    formats = {
        name.removesuffix(".weight"): format
        for name, format in source.plan.items()
        if format is not None and format.order is not None
    }
    if not formats:
        return source
    about = f"{len(formats)} matrices have inputs in an order of their own, for which files have no form"
    logger.warning("%s: they are written in %s", about, str(dtype).removeprefix("torch."))
    tensors: dict[str, str | Computed] = {}
    for name in source.names():
        module, _, part = name.rpartition(".")
        format = formats.get(module)
        if format is None or part not in format.parts:
            tensors[name] = name
        elif part == format.parts[0]:
            spec = source.spec(name)
            shape = spec.shape[0], format.weights_in(part, spec) // spec.shape[0]
            places = {part: f"{module}.{part}" for part in format.parts}
            tensors[f"{module}.weight"] = Computed(places, shape, dtype, partial(_dequantized, format, shape, dtype))
    plan = {name: format for name, format in source.plan.items() if name.removesuffix(".weight") not in formats}
    return ComputedSource(source, tensors, plan)


def _dequantized(format: WeightFormat, shape: Shape, dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
    """A matrix in a float dtype, of which a few rows at a time are in float32."""
    with torch.device("meta"):
        weight = QuantizedWeight(format, shape)
    weight.set_parts(parts)
    rows_of = format.rows_of(weight, None, torch.float32)
    whole = memory.empty(shape, dtype)
    for at in track(range(0, len(whole), ROWS)):
        rows = slice(at, at + ROWS)
        whole[rows] = format.unsort(rows_of(rows))
    return whole
