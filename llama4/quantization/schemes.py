"""Which weights are quantised, and how: schemes by name, and the plan that one makes for a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PLAIN", "SCHEMES", "Format", "Plan", "Scheme", "make_plan"]


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix [out, in] is stored.

    Attributes:
        kind: "int4" and "int8" are symmetric integers for weights alone; "fp8" is e4m3, and the inputs are rounded to
            it as well, token by token, while the model runs.
        group_size: neighbours along `in` that share a scale; None: all of a row.
    """

    kind: str
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}, a scale per {f'{self.group_size} weights' if self.group_size else 'output'}"


PLAIN = Format("plain")
"""Not quantised. A plan says so only of experts that are a Linear each, since the model has them otherwise."""

Plan = Mapping[str, Format]
"""Parameter of the unquantised model -> the format it is stored in."""

_FEED_FORWARD = r"language_model\.model\.layers\.(?P<layer>\d+)\.feed_forward\."
_PARTS = {
    "experts": _FEED_FORWARD + r"experts\.(gate_up|down)_proj",
    "shared": _FEED_FORWARD + r"shared_expert\.(gate|up|down)_proj\.weight",
    "dense": _FEED_FORWARD + r"(gate|up|down)_proj\.weight",
    "attention": r"language_model\.model\.layers\.(?P<layer>\d+)\.self_attn\.[qkvo]_proj\.weight",
    "head": r"language_model\.lm_head\.weight",
}
"""Parts of the model that can be quantised. Routers, norms, embeddings and the vision tower never are: they are small,
and what they get wrong nothing behind them can mend."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A named choice of formats.

    Attributes:
        kind: of the format.
        parts: keys of the parts of the model it is for.
        ends: whether the first and the last layer are, too.
    """

    kind: str
    parts: tuple[str, ...]
    ends: bool = True


_ALL = ("experts", "shared", "dense", "attention")

SCHEMES: dict[str, Scheme] = {
    "int4": Scheme("int4", _ALL),
    "int8": Scheme("int8", _ALL),
    "fp8": Scheme("fp8", _ALL),
    "int4_mixed": Scheme("int4", ("experts", "shared")),
    "fp8_mixed": Scheme("fp8", ("experts",), ends=False),
}
"""The mixed ones are Meta's own choices for Llama 4."""


def make_plan(name: str, shapes: Mapping[str, tuple[int, ...]], *, head: bool = False) -> dict[str, Format]:
    """The format of every parameter that a scheme quantises.

    Args:
        name: a key of `SCHEMES`.
        shapes: parameters of the unquantised model: experts [E, in, out], others [out, in].
        head: quantise the head, too.

    Raises:
        ValueError: an unknown scheme, or a matrix that its format cannot hold.
    """
    if name not in SCHEMES:
        raise ValueError(f"quantization={name!r} is not known; choose one of {', '.join(SCHEMES)}, or None")
    scheme = SCHEMES[name]
    parts = [*scheme.parts, "head"] if head else scheme.parts
    found: dict[str, int | None] = {}
    for part in parts:
        for parameter in shapes:
            if match := re.fullmatch(_PARTS[part], parameter):
                layer = match.groupdict().get("layer")
                found[parameter] = int(layer) if layer is not None else None
    last = max((layer for layer in found.values() if layer is not None), default=0)
    kept = {p for p, layer in found.items() if not scheme.ends and layer in (0, last)}
    chosen = [p for p in shapes if p in found and p not in kept]
    if not chosen:
        raise ValueError(
            f"quantization={name!r} is for {' and '.join(parts)}, of which this model has none; try 'int4'"
        )
    format = Format(scheme.kind, _group_size({p: shapes[p] for p in chosen}) if scheme.kind == "int4" else None)
    return dict.fromkeys(chosen, format)


def _group_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """128, or 32 where 128 does not divide all rows: one for the whole model, as engines expect it."""
    for parameter, shape in shapes.items():
        inputs, outputs = (shape[1], shape[2]) if len(shape) == 3 else (shape[1], shape[0])
        if inputs % 32 or outputs % 16:
            raise ValueError(
                f"{parameter} has {inputs} inputs and {outputs} outputs; int4 takes multiples of 32 and of 16: choose "
                "int8 or fp8"
            )
    return 128 if all(shape[1] % 128 == 0 for shape in shapes.values()) else 32
