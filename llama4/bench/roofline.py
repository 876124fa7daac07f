"""The least that a model has to compute and to read, counted from its configuration.

A row times a matrix [out, in] is 2 x out x in floating-point operations, and reads the matrix once, however many rows
there are. A query that sees S keys is 4 x S x head_dim, and reads S keys and values. What stands between products
(norms, RoPE, softmax, the addition of what layers give) is not counted, so no real run reaches its floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llama4.analysis.costs import EMBEDDING, HEAD, parameter_shapes, stored_bytes
from llama4.config import TextConfig
from llama4.quantization.schemes import Plan
from llama4.vision.config import VisionConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, gemm: float, memory: float) -> float:
        """The floor on a machine that does so many operations and reads so many bytes per second, both at once."""
        return max(self.flops / gemm, self.bytes / memory)


def matrices(text: TextConfig) -> dict[str, Shape]:
    """All that the decoder multiplies with: parameter -> its shape, [out, in], of routed experts [E, in, out]."""
    shapes = parameter_shapes(text)
    head = shapes[EMBEDDING]  # of the same shape, and perhaps the same numbers
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and name != EMBEDDING} | {HEAD: head}


def active_numbers(text: TextConfig, *, head: bool = True) -> int:
    """Weights that a token is multiplied with."""
    chosen = text.num_experts_per_tok
    return sum(
        math.prod(shape[1:]) * chosen if len(shape) == 3 else math.prod(shape)
        for name, shape in matrices(text).items()
        if head or name != HEAD
    )


def weight_bytes(text: TextConfig, plan: Plan, dtype: torch.dtype, experts: float) -> float:
    """Bytes of all matrices, with so many experts of each layer."""
    total = 0.0
    for name, shape in matrices(text).items():
        size = stored_bytes(shape, plan.get(name), dtype.itemsize)
        total += size * experts / shape[0] if len(shape) == 3 else size
    return total


def keys_seen(text: TextConfig, layer: int, positions: Iterable[int]) -> int:
    """Keys that the queries at these positions see in a layer, in all: of their chunk, or of the sequence."""
    window = text.window(layer)
    return sum(position + 1 if window is None else position % window + 1 for position in positions)


def attention_flops(text: TextConfig, positions: Iterable[int]) -> int:
    """Scores and the mix of values, over all layers, of queries at these positions."""
    per_key, positions = 4 * text.num_attention_heads * text.head_dim, list(positions)
    return per_key * sum(keys_seen(text, layer, positions) for layer in range(text.num_hidden_layers))


def prefill(text: TextConfig, plan: Plan, dtype: torch.dtype, tokens: int, past: int = 0) -> Work:
    """A prompt, or a piece of one, up to the logits of its last token; read are the weights, of experts as few as can
    be."""
    flops = 2 * tokens * active_numbers(text, head=False) + 2 * math.prod(matrices(text)[HEAD])
    flops += attention_flops(text, range(past, past + tokens))
    return Work(flops, weight_bytes(text, plan, dtype, text.num_experts_per_tok))


def decode(text: TextConfig, plan: Plan, dtype: torch.dtype, positions: Sequence[int], experts: float) -> Work:
    """One step: a token in every row, at these positions of their sequences; `experts` are the different ones that the
    rows of a layer are sent to, on average."""
    flops = 2 * len(positions) * active_numbers(text) + attention_flops(text, positions)
    per_key = 2 * text.num_key_value_heads * text.head_dim * dtype.itemsize
    cache = per_key * sum(keys_seen(text, layer, positions) for layer in range(text.num_hidden_layers))
    return Work(flops, weight_bytes(text, plan, dtype, experts) + cache)


def expected_experts(text: TextConfig, rows: int) -> float:
    """Different experts of a layer that so many rows are sent to if all are equally likely."""
    if not text.moe_layers:
        return 0.0
    return text.num_local_experts * (1 - (1 - text.num_experts_per_tok / text.num_local_experts) ** rows)


def vision(config: VisionConfig, tiles: int, hidden_size: int = 0, dtype: torch.dtype = torch.bfloat16) -> Work:
    """The tower over so many tiles, its adapter, and the projection into a decoder of `hidden_size` (0: without)."""
    W, P, out = config.hidden_size, config.num_patches, config.vision_output_dim
    layer = 4 * W * W + 2 * W * config.intermediate_size
    patch = config.num_channels * config.patch_size**2 * W
    adapter = config.intermediate_size * out + out * out + out * hidden_size
    numbers = patch + config.num_hidden_layers * layer + adapter
    flops = 2 * (P * patch + (P + 1) * config.num_hidden_layers * layer + config.tokens_per_tile * adapter)
    flops += 4 * config.num_hidden_layers * (P + 1) ** 2 * W
    return Work(tiles * flops, numbers * dtype.itemsize)
