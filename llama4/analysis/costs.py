"""What a model costs, counted from its configuration: bytes of its weights, bytes read and FLOPs for a token.

Pure functions; nothing is allocated. A multiplication and an addition are two FLOPs. Counted are the matrix products
and attention; norms, RoPE, softmax and the like are left out: together below 1% of the FLOPs at the released widths.

Letters: D hidden size, F expert width, E experts, V vocabulary, H query heads, C head_dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from llama4.config import DTYPE_BYTES, Llama4Config, TextConfig
from llama4.quantization.modules import PACKED
from llama4.quantization.schemes import Format, Plan, make_plan

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = "language_model.model.layers.{}."
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def parameter_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """The decoder's parameters as the model names them: Linear weights [out, in], experts [E, in, out]."""
    D, C = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * C, config.num_key_value_heads * C
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        layer = _LAYER.format(i)
        for part, rows, columns in (("q", queries, D), ("k", keys, D), ("v", keys, D), ("o", D, queries)):
            shapes[f"{layer}self_attn.{part}_proj.weight"] = (rows, columns)
            if config.attention_bias:
                shapes[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
        forward, width = f"{layer}feed_forward.", config.intermediate_size_mlp
        if config.uses_experts(i):
            width, experts = config.intermediate_size, config.num_local_experts
            shapes[f"{forward}router.weight"] = (experts, D)
            shapes[f"{forward}experts.gate_up_proj"] = (experts, D, 2 * width)
            shapes[f"{forward}experts.down_proj"] = (experts, width, D)
            forward += "shared_expert."
        shapes |= {f"{forward}{part}_proj.weight": (width, D) for part in ("gate", "up")}
        shapes[f"{forward}down_proj.weight"] = (D, width)
        shapes |= {f"{layer}{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
    shapes["language_model.model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, D)
    return shapes


def quantization_plan(config: TextConfig, scheme: str) -> dict[str, Format]:
    """What a scheme does to this model.

    Raises:
        ValueError: see `make_plan`.
    """
    return make_plan(scheme, parameter_shapes(config))


def parameter_bytes(config: TextConfig, plan: Plan | None = None, dtype: str = "bfloat16") -> dict[str, int]:
    """Bytes of each parameter of the decoder; of one that is quantised codes and scales together."""
    plan, size = plan or {}, DTYPE_BYTES[dtype]
    return {name: stored_bytes(shape, plan.get(name), size) for name, shape in parameter_shapes(config).items()}


def stored_bytes(shape: tuple[int, ...], format: Format | None, size: int) -> int:
    """Of a parameter whose numbers take `size` bytes each, or of one in a format, with scales of that size."""
    if format is None:
        return math.prod(shape) * size
    out_in = (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
    parts = PACKED[format.kind].part_shapes(format, out_in)
    sizes = {part: size if part == "weight_scale" else dtype.itemsize for part, (_, dtype) in parts.items()}
    return sum(math.prod(part_shape) * sizes[part] for part, (part_shape, _) in parts.items())


def vision_bytes(config: Llama4Config, dtype: str = "bfloat16") -> int:
    """Bytes of the vision tower and of the projection into the decoder, which no scheme quantises."""
    return (config.num_parameters() - config.text.num_parameters()) * DTYPE_BYTES[dtype]


def weight_bytes(config: Llama4Config, plan: Plan | None = None, dtype: str = "bfloat16") -> int:
    """Bytes of all weights."""
    return sum(parameter_bytes(config.text, plan, dtype).values()) + vision_bytes(config, dtype)


def share_per_token(config: TextConfig, name: str) -> float:
    """The part of a parameter that one token needs: of the experts those it is routed to, of the embeddings its own, of
    everything else all."""
    if re.search(r"\.experts\.\w+$", name):
        return config.num_experts_per_tok / config.num_local_experts
    if name == EMBEDDING and not config.tie_word_embeddings:
        return 1 / config.vocab_size
    return 1.0


def weight_bytes_per_token(config: TextConfig, plan: Plan | None = None, dtype: str = "bfloat16") -> float:
    """Bytes of weights that are read to decode one token of one sequence."""
    sizes = parameter_bytes(config, plan, dtype)
    return sum(size * share_per_token(config, name) for name, size in sizes.items())


def cache_bytes_per_token(config: TextConfig, context: int, dtype: str = "bfloat16", cache_dtype: str = "auto") -> int:
    """Bytes of keys and values that are read to decode token number `context` of a sequence."""
    return sum(
        config.visible_tokens(i, context) * config.cache_bytes_of_a_token(i, dtype, cache_dtype)
        for i in range(config.num_hidden_layers)
    )


def parameter_flops(config: TextConfig) -> dict[str, float]:
    """FLOPs that one token costs in each matrix; the head's are spent only where logits are wanted."""
    shapes = parameter_shapes(config)
    unused = set() if config.tie_word_embeddings else {EMBEDDING}
    return {
        name: 2 * math.prod(shape) * share_per_token(config, name)
        for name, shape in shapes.items()
        if len(shape) > 1 and name not in unused
    }


def attention_flops(config: TextConfig, tokens: int) -> int:
    """FLOPs of attention over a whole prompt: 4 C per query head, token and token that it sees."""
    return _attention_flops(config, (_pairs(tokens, config.window(i)) for i in range(config.num_hidden_layers)))


def _pairs(tokens: int, window: int | None) -> int:
    """How often a token sees a token, itself included."""
    if window is None:
        return tokens * (tokens + 1) // 2
    chunks, rest = divmod(tokens, window)
    return chunks * (window * (window + 1) // 2) + rest * (rest + 1) // 2


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
