"""Write a model of a known shape with random weights, to measure with: nothing is fetched.

`llama4 bench make small|mav|scout|maverick DIR [--quantization int4|int8|fp8] [--layers N]`

Its replies are noise, and its speed and memory are those of the shape. Quantized weights are drawn as they are stored,
a tensor at a time, so that a model of any size takes little memory to write.
"""

from __future__ import annotations

import itertools
import math
import zlib
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llama4.arguments import Parser
from llama4.bench.report import positive
from llama4.config import Llama4Config, TextConfig
from llama4.config.presets import maverick, scout
from llama4.config.rope import RopeScaling
from llama4.errors import ArgumentError
from llama4.families import family_of
from llama4.model.device import DTYPES
from llama4.model.experts import BACKENDS
from llama4.quantization.plan import QuantizationPlan, make_plan, out_in
from llama4.quantization.schemes import SCHEMES
from llama4.quantization.weight import Shape, TensorSpec
from llama4.text.tokenizer import Tokenizer
from llama4.text.vocabulary import LLAMA4
from llama4.units import bytes_text, dtype_name
from llama4.vision.config import VisionConfig
from llama4.weights.directory import check_free, scratch_directory
from llama4.weights.save import save
from llama4.weights.source import Origin

COMMON = b" etaoinsrhldcumfpgwybvkxjqz.,-'\nETAOINSRHLDCUMFPGWYBVKXJQZ"
"""Bytes of which the vocabulary has pairs and triples first."""
STEP = 101
"""Numbers between the windows of two rows."""


_WIDTHS = TextConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size_mlp=4096,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=131072,
)


def small() -> Llama4Config:
    """947M parameters by Scout's rules: 16 experts in every layer."""
    return _reduced(replace(_WIDTHS, intermediate_size=2048, num_local_experts=16, rope_scaling=RopeScaling()))


def mav() -> Llama4Config:
    """960M parameters by Maverick's rules: 64 experts in every other layer, no norm of queries and keys."""
    text = replace(_WIDTHS, intermediate_size=1024, num_local_experts=64, use_qk_norm=False)
    return _reduced(replace(text, moe_layers=None, interleave_moe_layer_step=2))


def _reduced(text: TextConfig) -> Llama4Config:
    vision = VisionConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        vision_output_dim=512,
        projector_input_dim=512,
        projector_output_dim=512,
        max_tiles=4,
    )
    return Llama4Config(text=text, vision=vision)


MODELS: dict[str, Callable[[], Llama4Config]] = {"small": small, "mav": mav, "scout": scout, "maverick": maverick}
"""Name -> shape. `small` and `mav` are those of the tables in docs/performance.md."""


def vocabulary(size: int) -> list[bytes]:
    """So many tokens by rank: all bytes, then pairs and triples of bytes, so that any text can be written."""
    rest = bytes(sorted(set(range(256)) - set(COMMON)))
    pairs = itertools.chain(itertools.product(COMMON, repeat=2), itertools.product(COMMON, rest))
    triples = itertools.product(COMMON, repeat=3)
    tokens = itertools.chain(((byte,) for byte in range(256)), pairs, triples)
    return [bytes(token) for token in itertools.islice(tokens, size)]


def make_tokenizer(config: Llama4Config, directory: Path) -> tuple[Tokenizer, Llama4Config]:
    """A tokenizer of the configuration's size with Llama 4's special tokens, and the configuration with their ids."""
    ranks = vocabulary(config.text.vocab_size - LLAMA4.num_special_tokens)
    assert len(ranks) + LLAMA4.num_special_tokens == config.text.vocab_size
    path = directory / "tokenizer.model"
    path.write_text("".join(f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)), "utf-8")
    tokenizer = Tokenizer(path, vocabulary=LLAMA4)
    ids = tokenizer.special_tokens
    text = replace(
        config.text,
        bos_token_id=ids[LLAMA4.bos],
        eos_token_id=tuple(ids[name] for name in LLAMA4.stop),
        pad_token_id=ids[LLAMA4.pad],
    )
    return tokenizer, replace(
        config,
        text=text,
        boi_token_index=ids["<|image_start|>"],
        eoi_token_index=ids["<|image_end|>"],
        image_token_index=ids["<|patch|>"],
    )


class RandomWeights:
    """The weights of a model, as they would be drawn before training, as a `Source`.

    Every row is a window of one long row of random numbers, so that no tensor takes more memory than that. Weights have
    variance 1 / inputs, norms are ones and biases zeros. Of packed weights codes and scales are drawn.

    Args:
        shapes: parameters of the unquantized model.
        plan: formats of those that are packed.
        dtype: of the others.
    """

    notes: Sequence[str] = ()

    def __init__(self, shapes: Mapping[str, Shape], plan: QuantizationPlan, dtype: torch.dtype) -> None:
        self.plan = plan
        self._specs: dict[str, TensorSpec] = {}
        self._spread: dict[str, float] = {}
        self._rows: dict[torch.dtype, Tensor] = {}
        for name, shape in shapes.items():
            format = plan.get(name)
            inputs = out_in(shape)[-1]
            spread = 1.0 if name.endswith("embed_tokens.weight") else inputs**-0.5
            if format is None:
                self._specs[name], self._spread[name] = TensorSpec(shape, dtype), spread
                continue
            for part, spec in format.part_specs(out_in(shape)).items():
                key = f"{name.removesuffix('.weight')}.{part}"
                self._specs[key], self._spread[key] = spec, spread / _CODES_STD[format.kind]

    def names(self) -> Collection[str]:
        return self._specs.keys()

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def read(self, name: str) -> Tensor:
        spec = self._specs[name]
        if len(spec.shape) == 1:
            return (torch.zeros if name.endswith("bias") else torch.ones)(spec.shape, dtype=spec.dtype)
        if name.endswith("weight_scale"):
            return torch.tensor(self._spread[name], dtype=spec.dtype).expand(spec.shape)
        *outer, width = spec.shape
        begin = zlib.crc32(name.encode()) % 4096
        rows = self._random(spec.dtype, begin + math.prod(outer) * STEP + width)[begin:]
        if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
            rows = rows * self._spread[name]
        strides = [STEP * math.prod(outer[i + 1 :]) for i in range(len(outer))]
        return rows.as_strided(spec.shape, (*strides, 1))

    def is_mapped(self, name: str) -> bool:
        return False

    def origin(self, name: str) -> Origin:
        return Origin(name)

    def _random(self, dtype: torch.dtype, count: int) -> Tensor:
        """The first numbers of the long row: normal ones, or codes as often as these would have them."""
        if len(self._rows.get(dtype, ())) < count:
            generator = torch.Generator().manual_seed(0)
            if dtype in _CODES:
                low, high = _CODES[dtype]
                drawn = torch.randint(low, high, (count,), generator=generator).to(dtype)
            else:
                normal = torch.randn(count, generator=generator)
                drawn = (normal * _CODES_STD["fp8"] if dtype.itemsize == 1 else normal).to(dtype)
            self._rows[dtype] = drawn
        return self._rows[dtype][:count]


_CODES = {torch.int32: (-(2**31), 2**31), torch.int8: (-127, 128)}
"""dtype of packed weights -> the codes that are drawn, evenly."""
_CODES_STD = {"int4": 4.6, "int8": 73.6, "fp8": 64.0}
"""The standard deviation of the codes drawn, by format."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    check_free(options.target)
    config = MODELS[options.model]()
    if options.layers is not None:
        if options.layers > config.text.num_hidden_layers:
            raise ArgumentError(f"{options.model} has {config.text.num_hidden_layers} layers; --layers may be no more")
        text = replace(config.text, num_hidden_layers=options.layers, moe_layers=None, layer_types=None)
        config = replace(config, text=replace(text, no_rope_layers=None))
    with torch.device("meta"):
        model = family_of(config).build(config, BACKENDS["loop"])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    plan = make_plan(options.quantization, shapes) if options.quantization else {}
    source = RandomWeights(shapes, plan, DTYPES[options.dtype])
    with scratch_directory("make") as scratch:
        tokenizer, config = make_tokenizer(config, scratch)
        save(source, config, options.target, tokenizer=tokenizer, name=f"random-{options.model}", progress=True)
    written = sum(path.stat().st_size for path in Path(options.target).glob("*.safetensors"))
    kind = options.quantization or options.dtype
    print(f"{options.target}: the shape of {options.model} in {kind}, {bytes_text(written)} of random weights")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="llama4 bench make", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS, help=", ".join(MODELS))
    parser.add_argument("target", metavar="DIR", help="the directory to make")
    kinds = [name for name, scheme in SCHEMES.items() if scheme.kind in _CODES_STD]
    parser.add_argument(
        "--quantization", choices=kinds, metavar="SCHEME", help=f"draw packed weights: {', '.join(kinds)}"
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        default="bfloat16",
        help="of weights that are not packed (default: %(default)s)",
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="the first N layers alone")
    return parser
