"""What a model costs, counted from its configuration: bytes of its weights and its cache, bytes read, FLOPs.

Pure functions; nothing is allocated. A multiplication and an addition are two FLOPs. Matrix products and attention are
counted; norms, RoPE, softmax and the like are not: together they are below 1% of the FLOPs at the released widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from llama4.cache.formats import resolve_format
from llama4.config import CACHE_BLOCK, Llama4Config, TextConfig
from llama4.config.window import most_visible_tokens, visible_pairs
from llama4.families.names import EMBEDDING, HEAD
from llama4.quantization.plan import QuantizationPlan, make_plan, out_in
from llama4.quantization.weight import WeightFormat

_LAYER = "language_model.model.layers.{}."


def parameter_shapes(config: TextConfig, plan: QuantizationPlan | None = None) -> dict[str, tuple[int, ...]]:
    """The decoder's parameters as the model names them: Linear weights [O, I], experts [E, I, O].

    Args:
        plan: may have gate and up of experts apart, or a Linear for each expert, see `swap_modules`.
    """
    plan = plan or {}
    D, C = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * C, config.num_key_value_heads * C
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.num_embeddings, D)}
    for i in range(config.num_hidden_layers):
        layer = _LAYER.format(i)
        attention = f"{layer}{'cross' if config.is_cross(i) else 'self'}_attn."
        if config.is_cross(i):
            shapes |= {f"{attention}{norm}_norm.weight": (C,) for norm in "qk"}
            shapes |= {f"{layer}cross_attn_{gate}_gate": (1,) for gate in ("attn", "mlp")}
        for part, rows, columns in (("q", queries, D), ("k", keys, D), ("v", keys, D), ("o", D, queries)):
            shapes[f"{attention}{part}_proj.weight"] = (rows, columns)
            if config.attention_bias:
                shapes[f"{attention}{part}_proj.bias"] = (rows,)
        forward, width = f"{layer}feed_forward.", config.intermediate_size_mlp
        if config.mlp_bias and not config.uses_experts(i):
            shapes |= {f"{forward}{part}_proj.bias": (width,) for part in ("gate", "up")}
            shapes[f"{forward}down_proj.bias"] = (D,)
        if config.uses_experts(i):
            width, experts = config.intermediate_size, config.num_local_experts
            shapes[f"{forward}router.weight"] = (experts, D)
            stack = f"{forward}experts."
            if f"{stack}0.gate_proj.weight" in plan:
                for path in (f"{stack}{expert}." for expert in range(experts)):
                    shapes |= {f"{path}{part}_proj.weight": (width, D) for part in ("gate", "up")}
                    shapes[f"{path}down_proj.weight"] = (D, width)
            else:
                parts = {"gate": width, "up": width} if f"{stack}gate_proj" in plan else {"gate_up": 2 * width}
                shapes |= {f"{stack}{part}_proj": (experts, D, size) for part, size in parts.items()}
                shapes[f"{stack}down_proj"] = (experts, width, D)
            forward += "shared_expert."
        shapes |= {f"{forward}{part}_proj.weight": (width, D) for part in ("gate", "up")}
        shapes[f"{forward}down_proj.weight"] = (D, width)
        shapes |= {f"{layer}{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
    shapes["language_model.model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, D)
    return shapes


def quantization_plan(config: TextConfig, scheme: str) -> dict[str, WeightFormat]:
    """The format of each parameter that a scheme quantizes.

    Raises:
        Llama4Error: see `make_plan`.
    """
    return make_plan(scheme, parameter_shapes(config))


def parameter_bytes(
    config: TextConfig, plan: QuantizationPlan | None = None, dtype: str = "bfloat16"
) -> dict[str, int]:
    """Bytes of each parameter of the decoder; of a quantized one, quantized values and scales together."""
    plan, size = plan or {}, getattr(torch, dtype).itemsize
    shapes = parameter_shapes(config, plan)
    return {name: stored_bytes(shape, plan.get(name), size) for name, shape in shapes.items()}


def stored_bytes(shape: tuple[int, ...], format: WeightFormat | None, size: int) -> int:
    """Bytes of a parameter whose elements take `size` bytes each, or of one in a format, with scales of that size."""
    if format is None:
        return math.prod(shape) * size
    parts = format.part_specs(out_in(shape))
    return sum(math.prod(spec.shape) * size if part == "weight_scale" else spec.nbytes for part, spec in parts.items())


def vision_bytes(config: Llama4Config, dtype: str = "bfloat16") -> int:
    """Bytes of the vision tower and of the projection into the decoder, which no scheme quantizes."""
    return (config.num_parameters() - config.text.num_parameters()) * getattr(torch, dtype).itemsize


def weight_bytes(config: Llama4Config, plan: QuantizationPlan | None = None, dtype: str = "bfloat16") -> int:
    """Bytes of all weights."""
    return sum(parameter_bytes(config.text, plan, dtype).values()) + vision_bytes(config, dtype)


def is_of_experts(name: str) -> bool:
    """Whether a parameter is one of routed experts."""
    return ".experts." in name


def share_per_token(config: TextConfig, name: str) -> float:
    """The share of a parameter that one token reads: the experts it is routed to, one row of the embeddings, all of
    everything else."""
    if is_of_experts(name):
        return config.num_experts_per_tok / config.num_local_experts
    if name == EMBEDDING and not config.tie_word_embeddings:
        return 1 / config.num_embeddings
    return 1.0


def weight_bytes_read(config: TextConfig, plan: QuantizationPlan | None = None, dtype: str = "bfloat16") -> float:
    """Bytes of weights that are read to decode one token of one sequence."""
    sizes = parameter_bytes(config, plan, dtype)
    return sum(size * share_per_token(config, name) for name, size in sizes.items())


def cache_bytes(config: TextConfig, num_tokens: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
    """Bytes of the key/value cache of one sequence of `num_tokens` tokens.

    Layers that see the whole context keep every token; chunked layers keep those of the last token's chunk. Memory is
    taken in blocks of `CACHE_BLOCK` tokens.

    Args:
        dtype: of the model.
        cache_dtype: of the layers that see the whole context: "auto" (the model's), a dtype, or a quantized format
            ("int8", "fp8", "int4"). Chunked layers have the model's.

    Raises:
        Llama4Error: an unknown cache_dtype.
    """
    return sum(layer_cache_bytes(config, i, num_tokens, dtype, cache_dtype) for i in range(config.num_hidden_layers))


def peak_cache_bytes(config: TextConfig, num_tokens: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
    """The most bytes of that cache while the sequence grows: chunked layers once kept a whole chunk, if one was
    filled."""
    layers = range(config.num_hidden_layers)
    kept = [most_visible_tokens(num_tokens, config.window(i)) for i in layers]
    return sum(layer_cache_bytes(config, i, kept[i], dtype, cache_dtype) for i in layers)


def layer_cache_bytes(
    config: TextConfig, layer: int, num_tokens: int, dtype: str = "bfloat16", cache_dtype: str = "auto"
) -> int:
    """The bytes of `cache_bytes` that one layer has."""
    blocks = math.ceil(config.visible_tokens(layer, num_tokens) / CACHE_BLOCK)
    return blocks * CACHE_BLOCK * key_value_bytes(config, layer, dtype, cache_dtype)


def picture_cache_bytes(config: Llama4Config, dtype: str = "bfloat16") -> int:
    """Bytes that layers of cross-attention keep of a picture of the most tiles."""
    vision, text = config.vision, config.text
    if vision is None:
        return 0
    keys = vision.max_tiles * vision.keys_per_tile
    return 2 * keys * len(text.cross_layers) * text.num_key_value_heads * text.head_dim * getattr(torch, dtype).itemsize


def key_value_bytes(config: TextConfig, layer: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
    """Bytes of one token's keys and values in one layer."""
    wanted = cache_dtype if config.window(layer) is None else "auto"
    format = resolve_format(wanted, getattr(torch, dtype))
    scale = torch.bfloat16.itemsize if format.scaled else 0
    return 2 * config.num_key_value_heads * (format.bytes(config.head_dim) + scale)


def cache_bytes_read(config: TextConfig, context: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
    """Bytes of keys and values that are read to decode token number `context` of a sequence."""
    return sum(
        config.visible_tokens(i, context) * key_value_bytes(config, i, dtype, cache_dtype)
        for i in range(config.num_hidden_layers)
    )


def parameter_flops(config: TextConfig) -> dict[str, float]:
    """FLOPs of one token in each matrix; the head's are spent only where logits are wanted."""
    shapes = parameter_shapes(config)
    unused = set() if config.tie_word_embeddings else {EMBEDDING}
    return {
        name: 2 * math.prod(shape) * share_per_token(config, name)
        for name, shape in shapes.items()
        if len(shape) > 1 and name not in unused
    }


def attention_flops(config: TextConfig, tokens: int) -> int:
    """FLOPs of attention over a whole prompt: 4 C for every query head and every pair of a token and one it sees."""
    windows = (config.window(i) for i in config.self_layers)
    return _attention_flops(config, (visible_pairs(tokens, window) for window in windows))


def _attention_flops(config: TextConfig, pairs: Iterable[int]) -> int:
    return 4 * config.num_attention_heads * config.head_dim * sum(pairs)


def flops_per_token(config: TextConfig, context: int) -> float:
    """FLOPs to decode token number `context`."""
    seen = (config.visible_tokens(i, context) for i in range(config.num_hidden_layers))
    return sum(parameter_flops(config).values()) + _attention_flops(config, seen)


def prefill_flops(config: TextConfig, tokens: int) -> float:
    """FLOPs to read a prompt, of which only the last token needs the head."""
    flops = parameter_flops(config)
    head = flops[EMBEDDING if config.tie_word_embeddings else HEAD]
    return tokens * (sum(flops.values()) - head) + head + attention_flops(config, tokens)
