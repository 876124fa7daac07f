"""Roofline bounds: the least FLOP and bytes that a model needs, counted from its configuration.

A row times a matrix [O, I] takes 2 x O x I FLOP and reads the matrix once, however many rows there are. A query over S
keys takes 4 x S x head_dim per head and reads S keys and values. Elementwise work (norms, RoPE, softmax, residual sums)
is not counted, so no real run reaches its bound. The model: Williams, Waterman, Patterson, "Roofline", CACM 2009.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llama4.analysis.costs import is_of_experts, parameter_shapes, stored_bytes
from llama4.bench.peak_rates import PeakRates
from llama4.config import TextConfig
from llama4.config.window import visible_tokens
from llama4.families.names import EMBEDDING, HEAD
from llama4.quantization.plan import QuantizationPlan
from llama4.vision.config import VisionConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """FLOP, and bytes read."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, peak: PeakRates) -> float:
        """The roofline bound: the longer of computing at the peak rate and reading at the peak rate."""
        return max(self.flops / peak.gemm, self.bytes / peak.memory)


def matrices(text: TextConfig, plan: QuantizationPlan | None = None) -> dict[str, Shape]:
    """All weight matrices of the decoder: parameter -> its shape, see `parameter_shapes`."""
    shapes = parameter_shapes(text, plan)
    head = shapes[EMBEDDING]  # the same shape, and the same weights if they are tied
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and name != EMBEDDING} | {HEAD: head}


def active_numbers(text: TextConfig, *, head: bool = True) -> int:
    """Weights that one token is multiplied with."""
    chosen = text.num_experts_per_tok
    return sum(
        math.prod(shape[1:]) * chosen if len(shape) == 3 else math.prod(shape)
        for name, shape in matrices(text).items()
        if head or name != HEAD
    )


def weight_bytes(text: TextConfig, plan: QuantizationPlan, dtype: torch.dtype, experts: float) -> float:
    """Bytes of all matrices, with `experts` of each layer's experts."""
    total = 0.0
    for name, shape in matrices(text, plan).items():
        size = stored_bytes(shape, plan.get(name), dtype.itemsize)
        total += size * experts / text.num_local_experts if is_of_experts(name) else size
    return total


def keys_seen(text: TextConfig, layer: int, positions: Iterable[int]) -> int:
    """Keys that the queries at these positions see in a layer, summed: of their chunk, or of the sequence."""
    window = text.window(layer)
    return sum(visible_tokens(position, window) for position in positions)


def attention_flops(text: TextConfig, positions: Iterable[int]) -> int:
    """Q K^T and the product with V, over all layers, of queries at these positions."""
    per_key, positions = 4 * text.num_attention_heads * text.head_dim, list(positions)
    return per_key * sum(keys_seen(text, layer, positions) for layer in range(text.num_hidden_layers))


def prefill(text: TextConfig, plan: QuantizationPlan, dtype: torch.dtype, tokens: int, past: int = 0) -> Work:
    """A prompt, or a piece of one, up to the logits of its last token. Counted as read are the weights, with as few
    experts as possible."""
    flops = 2 * tokens * active_numbers(text, head=False) + 2 * math.prod(matrices(text)[HEAD])
    flops += attention_flops(text, range(past, past + tokens))
    return Work(flops, weight_bytes(text, plan, dtype, text.num_experts_per_tok))


def decode(
    text: TextConfig, plan: QuantizationPlan, dtype: torch.dtype, positions: Sequence[int], experts: float
) -> Work:
    """One step: a token in every row, at these positions of their sequences. `experts` is the number of different
    experts of a layer that the rows are routed to, on average."""
    flops = 2 * len(positions) * active_numbers(text) + attention_flops(text, positions)
    per_key = 2 * text.num_key_value_heads * text.head_dim * dtype.itemsize
    cache = per_key * sum(keys_seen(text, layer, positions) for layer in range(text.num_hidden_layers))
    return Work(flops, weight_bytes(text, plan, dtype, experts) + cache)


def expected_experts(text: TextConfig, rows: int) -> float:
    """Expected number of different experts of a layer for so many rows, if all experts are equally likely."""
    if not text.moe_layers:
        return 0.0
    return text.num_local_experts * (1 - (1 - text.num_experts_per_tok / text.num_local_experts) ** rows)


def vision(config: VisionConfig, tiles: int, hidden_size: int = 0, dtype: torch.dtype = torch.bfloat16) -> Work:
    """The vision tower over `tiles` tiles, its adapter, and the projection to `hidden_size` (0: without)."""
    W, P, out = config.hidden_size, config.num_patches, config.vision_output_dim
    layer = 4 * W * W + 2 * W * config.intermediate_size
    patch = config.num_channels * config.patch_size**2 * W
    adapter = config.intermediate_size * out + out * out + out * hidden_size
    numbers = patch + config.num_hidden_layers * layer + adapter
    flops = 2 * (P * patch + (P + 1) * config.num_hidden_layers * layer + config.tokens_per_tile * adapter)
    flops += 4 * config.num_hidden_layers * (P + 1) ** 2 * W
    return Work(tiles * flops, numbers * dtype.itemsize)
