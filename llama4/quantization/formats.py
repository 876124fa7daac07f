"""The formats of weights, by name."""

from __future__ import annotations

from llama4.quantization.fp4 import Mxfp4, Nvfp4
from llama4.quantization.fp8 import Fp8
from llama4.quantization.gguf_blocks import GGUF_FORMATS
from llama4.quantization.int4 import Int4
from llama4.quantization.int4_zeros import Int4Zeros
from llama4.quantization.int8 import Int8
from llama4.quantization.nf4 import Nf4
from llama4.quantization.weight import WeightFormat

FORMATS: dict[str, type[WeightFormat]] = {cls.kind: cls for cls in (Int4, Int4Zeros, Int8, Fp8, Mxfp4, Nvfp4, Nf4)} | {
    format.kind: type(format) for format in GGUF_FORMATS.values()
}
