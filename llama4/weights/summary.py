"""How much room a checkpoint's weights take, and in which formats, from the headers of its files."""

from __future__ import annotations

from dataclasses import dataclass

from llama4.units import bytes_text, count_text
from llama4.weights.source import Source


@dataclass(frozen=True)
class WeightsSummary:
    """What the weights of a checkpoint are.

    Attributes:
        formats: of those that are quantized.
        quantized: how many weights are.
        quantized_bytes: what they take, scales included.
        dtypes: of the other tensors, the one with the most bytes first.
        bytes: of all tensors.
    """

    formats: tuple[str, ...]
    quantized: int
    quantized_bytes: int
    dtypes: tuple[str, ...]
    bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized weights, scales included."""
        return round(8 * self.quantized_bytes / self.quantized, 2) if self.quantized else None

    def __str__(self) -> str:
        if not self.quantized:
            return f"{', '.join(self.dtypes)}; {bytes_text(self.bytes)} in all"
        return (
            f"{' and '.join(self.formats)}; {count_text(self.quantized)} weights of {self.bits_per_weight} bits, "
            f"scales included; {bytes_text(self.bytes)} in all"
        )


def summarize(source: Source) -> WeightsSummary:
    """The summary of a checkpoint; nothing is read."""
    modules = {name.removesuffix(".weight"): format for name, format in source.plan.items() if format is not None}
    quantized, quantized_bytes, total = 0, 0, 0
    dtypes: dict[str, int] = {}
    for name in source.names():
        spec, (module, _, part) = source.spec(name), name.rpartition(".")
        total += spec.nbytes
        if module in modules and part != "bias":
            quantized_bytes += spec.nbytes
            quantized += modules[module].weights_in(part, spec)
        else:
            dtype = str(spec.dtype).removeprefix("torch.")
            dtypes[dtype] = dtypes.get(dtype, 0) + spec.nbytes
    return WeightsSummary(
        formats=tuple(sorted({str(format) for format in modules.values()})),
        quantized=quantized,
        quantized_bytes=quantized_bytes,
        dtypes=tuple(sorted(dtypes, key=lambda dtype: -dtypes[dtype])),
        bytes=total,
    )
