"""What is quantized in a model: the plan that a scheme makes for its matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from llama4.errors import ArgumentError, Llama4Error
from llama4.quantization.formats import FORMATS
from llama4.quantization.schemes import SCHEMES
from llama4.quantization.weight import Shape, WeightFormat

QuantizationPlan: TypeAlias = Mapping[str, WeightFormat | None]
"""Parameter of the unquantized model -> the format of its weights; parameters that are not quantized are left out.

NF4 checkpoints may have three Linears per expert in place of stacks. A plan then names each Linear, and has None for
those that are not quantized: without it, the model would stack them.
"""

_FEED_FORWARD = r"language_model\.model\.layers\.(?P<layer>\d+)\.feed_forward\."
PARTS = {
    "experts": _FEED_FORWARD + r"experts\.(gate_up|down)_proj",
    "shared": _FEED_FORWARD + r"shared_expert\.(gate|up|down)_proj\.weight",
    "dense": _FEED_FORWARD + r"(gate|up|down)_proj\.weight",
    "attention": r"language_model\.model\.layers\.(?P<layer>\d+)\.(?:self|cross)_attn\.[qkvo]_proj\.weight",
    "head": r"language_model\.lm_head\.weight",
}
"""Parts of the model that can be quantized, as patterns of parameter names. Routers, norms, embeddings and the vision
tower never are: they are small, and their errors reach everything behind them."""


def out_in(shape: Shape) -> Shape:
    """Shape of a parameter of the unquantized model -> that of its matrices [O, I]; experts are stored [E, I, O]."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def make_plan(
    name: str, shapes: Mapping[str, Shape], *, head: bool = False, parts: Mapping[str, str] = PARTS
) -> dict[str, WeightFormat]:
    """The format of every parameter that a scheme quantizes.

    Args:
        name: a key of `SCHEMES`.
        shapes: parameters of the unquantized model: experts [E, in, out], others [out, in].
        head: quantize the head, too.
        parts: parts that can be quantized, as patterns.

    Raises:
        Llama4Error: an unknown scheme, or a matrix that its format cannot store.
    """
    if name not in SCHEMES:
        raise ArgumentError(f"quantization={name!r} is not known; choose one of {', '.join(SCHEMES)}, or None")
    scheme = SCHEMES[name]
    wanted = [*scheme.parts, "head"] if head else scheme.parts
    layers: dict[str, int | None] = {}
    for part in wanted:
        for parameter in shapes:
            if part in parts and (match := re.fullmatch(parts[part], parameter)):
                layer = match.groupdict().get("layer")
                layers[parameter] = int(layer) if layer is not None else None
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    left_out = {parameter for parameter, layer in layers.items() if not scheme.ends and layer in (0, last)}
    chosen = [parameter for parameter in shapes if parameter in layers and parameter not in left_out]
    if not chosen:
        raise Llama4Error(
            f"quantization={name!r} is for {' and '.join(wanted)}, of which this model has none; try 'int4'"
        )
    format = FORMATS[scheme.kind].for_matrices({parameter: out_in(shapes[parameter]) for parameter in chosen})
    return dict.fromkeys(chosen, format)
