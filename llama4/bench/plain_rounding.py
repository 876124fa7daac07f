"""Plain rounding, for comparison: scales from the largest weight (absmax), as the package compressed-tensors computes
them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llama4.quantization.modules import PACKED
from llama4.quantization.schemes import Format, make_plan
from llama4.text.tokenizer import load_tokenizer
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.compressed import group_config
from llama4.weights.quantizing import QuantizingSource
from llama4.weights.save import save


class PlainSource(QuantizingSource):
    """An unquantised checkpoint in the same formats, with all values and scales computed by compressed-tensors."""

    def rounded(self, weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
        return round_plainly(weight_OI, format)


def round_plainly(weight_OI: Tensor, format: Format) -> dict[str, Tensor]:
    """What `PackedWeight.quantize` gives, with compressed-tensors' own scales and quantised values.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams
    except ImportError as error:
        raise ValueError(
            f"plain rounding is that of the package compressed-tensors ({error}); pip install compressed-tensors"
        ) from error
    content = group_config(format, ["Linear"])
    scheme = QuantizationScheme(**content)
    groups = weight_OI.unflatten(-1, (-1, format.group_size or weight_OI.shape[-1]))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(content["format"])
    parts = compressor.compress({"weight": weight_OI, "weight_scale": scale.to(weight_OI.dtype)}, scheme)
    return {part: parts[part].contiguous() for part in PACKED[format.kind].parts}


def write_plain(source: Path, target: Path, scheme: str) -> None:
    """`llama4.weights.convert.quantize`, with plain rounding."""
    config, weights = open_checkpoint(source)
    shapes = {weights.names.to_model(key) or key: weights.shape(key) for key in weights.keys()}  # noqa: SIM118
    tokenizer = load_tokenizer(source, config)
    plain = PlainSource(weights, make_plan(scheme, shapes))
    save(plain, config, target, write_extra=tokenizer.save if tokenizer is not None else None)
