"""Schemes by name: which parts of a model are quantized, and in which format. Imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass

from llama4.errors import ArgumentError

__all__ = ["ACTIVATIONS", "CALIBRATED", "SCHEMES", "Scheme"]

ACTIVATIONS = ("auto", "float", "int8")
"""What products with packed weights take, see `modules.choose_activations`."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A named choice of weights to quantize.

    Attributes:
        kind: of the format: a key of `formats.FORMATS`.
        parts: of the model: keys of `plan.PARTS`.
        ends: whether the first and the last layer are quantized, too.
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

CALIBRATED: dict[str, str] = {"gptq": "int4"}
"""What `llama4 quantize` alone can do, with texts for calibration -> the scheme that has the same format."""


def check_names(quantization: str | None, activations: str) -> None:
    """What a caller asks of a model that is loaded.

    Raises:
        ArgumentError: a name that is not known, or a scheme that takes texts.
    """
    if quantization in CALIBRATED:
        raise ArgumentError(
            f"quantization={quantization!r} takes texts, and is done once: `llama4 quantize SRC DST --scheme "
            f"{quantization} --calibration FILE`; load what it writes"
        )
    if quantization is not None and quantization not in SCHEMES:
        raise ArgumentError(f"quantization={quantization!r} is not known; choose one of {', '.join(SCHEMES)}, or None")
    if activations not in ACTIVATIONS:
        raise ArgumentError(f"activations={activations!r} is not known; choose one of {', '.join(ACTIVATIONS)}")
