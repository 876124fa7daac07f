"""Plain rounding, for comparison: scales from the largest weight (absmax), as the package compressed-tensors computes
them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llama4.errors import Llama4Error
from llama4.families import family_of
from llama4.quantization.plan import make_plan
from llama4.quantization.weight import WeightFormat
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.compressed import group_config
from llama4.weights.quantizing import QuantizingSource
from llama4.weights.save import save


def round_to_absmax(weight_OI: Tensor, format: WeightFormat) -> dict[str, Tensor]:
    """What `WeightFormat.quantize` gives, with compressed-tensors' own scales and quantized values.

    Raises:
        Llama4Error: the package is not installed.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams
    except ImportError as error:
        raise Llama4Error(
            f"plain rounding is that of the package compressed-tensors ({error}); pip install compressed-tensors"
        ) from error
    content = group_config(format, ["Linear"])
    scheme = QuantizationScheme(**content)
    groups = weight_OI.unflatten(-1, (-1, format.group_size or weight_OI.shape[-1]))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(content["format"])
    parts = compressor.compress({"weight": weight_OI, "weight_scale": scale.to(weight_OI.dtype)}, scheme)
    return {part: parts[part].contiguous() for part in format.parts}


def write_plain(source: Path, target: Path, scheme: str) -> None:
    """`llama4.weights.convert.quantize`, with plain rounding."""
    config, weights = open_checkpoint(source)
    shapes = {name: weights.spec(name).shape for name in weights.names()}
    tokenizer = family_of(config).load_tokenizer(source, config)
    plain = QuantizingSource(weights, make_plan(scheme, shapes), round_to_absmax)
    save(plain, config, target, tokenizer=tokenizer)
