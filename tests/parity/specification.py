"""Llama 4 in float64, one token, head and expert at a time: slow, and meant to be read as the specification.

Nothing here is shared with the library but the names of parameters and of configuration fields. A token's position is
absolute, RoPE rotates by its full angle, masks are written out, images are walked patch by patch.

Shapes: T tokens, D hidden size, H heads, C head_dim, n tiles, P patches of a tile, W width of the vision tower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama4.config import Llama4Config, TextConfig
from llama4.vision.config import VisionConfig

Weights = dict[str, Tensor]


@dataclass
class Plain:
    """What came out: logits [T, V], and how clearly the routers chose (the least gap between the last chosen and the
    first unchosen expert's logit, over all tokens and layers)."""

    logits: Tensor
    margin: float
    experts: list[Tensor] = field(default_factory=list)
    """Per layer with experts, the chosen ones, [T, k]."""


def run(
    weights: Weights,
    config: Llama4Config,
    ids: list[int],
    tiles: Tensor | None = None,
    *,
    first_position: int = 0,
) -> Plain:
    """Logits of one sequence whose first token is at `first_position`."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["language_model.model.embed_tokens.weight"][ids]
    if tiles is not None:
        assert config.vision is not None
        features = [image_tokens(w, config.vision, tile.double()) for tile in tiles]
        x[torch.tensor(ids) == config.image_token_index] = torch.cat(features)
    result = Plain(x, math.inf)
    positions = [first_position + t for t in range(len(ids))]
    for i in range(config.text.num_hidden_layers):
        x = decoder_layer(w, config.text, i, x, positions, result)
    x = torch.stack([rms_norm(row, w["language_model.model.norm.weight"], config.text.rms_norm_eps) for row in x])
    head = w.get("language_model.lm_head.weight", w["language_model.model.embed_tokens.weight"])
    result.logits = x @ head.T
    return result


# -- decoder -------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x / math.sqrt(float((x * x).mean()) + eps)
    return normed if weight is None else normed * weight


def decoder_layer(w: Weights, config: TextConfig, i: int, x_TD: Tensor, positions: list[int], result: Plain) -> Tensor:
    name, eps = f"language_model.model.layers.{i}", config.rms_norm_eps
    normed = torch.stack([rms_norm(row, w[f"{name}.input_layernorm.weight"], eps) for row in x_TD])
    x_TD = x_TD + attention(w, config, i, normed, positions)
    normed = torch.stack([rms_norm(row, w[f"{name}.post_attention_layernorm.weight"], eps) for row in x_TD])
    assert config.moe_layers is not None
    if i in config.moe_layers:
        rows = [mixture(w, config, f"{name}.feed_forward", row, result) for row in normed]
        result.experts.append(torch.tensor([chosen for _, chosen in rows]))
        return x_TD + torch.stack([out for out, _ in rows])
    return x_TD + torch.stack([swiglu(w, f"{name}.feed_forward", row) for row in normed])


def attention(w: Weights, config: TextConfig, i: int, x_TD: Tensor, positions: list[int]) -> Tensor:
    name, C = f"language_model.model.layers.{i}.self_attn", config.head_dim

    def project(which: str, x: Tensor) -> Tensor:
        bias = w.get(f"{name}.{which}_proj.bias")
        out = x @ w[f"{name}.{which}_proj.weight"].T
        return out if bias is None else out + bias

    q, k, v = (project(which, x_TD).view(len(x_TD), -1, C) for which in "qkv")
    assert config.no_rope_layers is not None
    uses_rope = config.no_rope_layers[i] == 1
    for t, position in enumerate(positions):
        for heads in (q, k):
            for h in range(heads.shape[1]):
                if uses_rope:
                    heads[t, h] = rope(heads[t, h], position, config)
                    if config.use_qk_norm:
                        heads[t, h] = rms_norm(heads[t, h], None, config.rms_norm_eps)
        if not uses_rope and config.attn_temperature_tuning:
            q[t] *= math.log(math.floor((position + 1) / config.floor_scale) + 1) * config.attn_scale + 1
    chunk = config.attention_chunk_size if uses_rope else None
    per_group = config.num_attention_heads // config.num_key_value_heads
    out = torch.zeros_like(q)
    for t, position in enumerate(positions):
        seen = [s for s in range(t + 1) if chunk is None or positions[s] // chunk == position // chunk]
        for h in range(config.num_attention_heads):
            keys, values = k[seen, h // per_group], v[seen, h // per_group]
            out[t, h] = (keys @ q[t, h] / math.sqrt(C)).softmax(0) @ values
    return project("o", out.flatten(1))


def rope(x_C: Tensor, position: int, config: TextConfig) -> Tensor:
    """Consecutive pairs are complex numbers, rotated by position times frequency."""
    C, rotated = len(x_C), x_C.clone()
    for pair in range(C // 2):
        frequency = config.rope_theta ** (-2 * pair / C)
        if (scaling := config.rope_scaling) is not None:
            wavelength = 2 * math.pi / frequency
            original = scaling.original_max_position_embeddings
            if scaling.rope_type == "linear" or wavelength > original / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength >= original / scaling.high_freq_factor:
                low, high = scaling.low_freq_factor, scaling.high_freq_factor
                kept = (original / wavelength - low) / (high - low)
                frequency = (1 - kept) * frequency / scaling.factor + kept * frequency
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        real, imaginary = x_C[2 * pair], x_C[2 * pair + 1]
        rotated[2 * pair], rotated[2 * pair + 1] = real * cos - imaginary * sin, real * sin + imaginary * cos
    return rotated


def swiglu(w: Weights, name: str, x_D: Tensor) -> Tensor:
    gate, up = w[f"{name}.gate_proj.weight"] @ x_D, w[f"{name}.up_proj.weight"] @ x_D
    return w[f"{name}.down_proj.weight"] @ (gate * gate.sigmoid() * up)


def mixture(w: Weights, config: TextConfig, name: str, x_D: Tensor, result: Plain) -> tuple[Tensor, list[int]]:
    """The shared expert sees x; a chosen one sees score * x."""
    logits = (w[f"{name}.router.weight"] @ x_D).tolist()
    ranking = sorted(range(len(logits)), key=lambda e: (-logits[e], e))
    chosen, others = ranking[: config.num_experts_per_tok], ranking[config.num_experts_per_tok :]
    if others:
        result.margin = min(result.margin, logits[chosen[-1]] - logits[others[0]])
    out = swiglu(w, f"{name}.shared_expert", x_D)
    for e in chosen:
        routed = x_D / (1 + math.exp(-logits[e]))
        gate, up = (routed @ w[f"{name}.experts.gate_up_proj"][e]).chunk(2)
        out = out + (gate * gate.sigmoid() * up) @ w[f"{name}.experts.down_proj"][e]
    return out, chosen


# -- vision --------------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def image_tokens(w: Weights, config: VisionConfig, tile_3SS: Tensor) -> Tensor:
    """One tile -> what replaces the embeddings of its `<|patch|>` tokens."""
    side, patch, eps = config.image_size // config.patch_size, config.patch_size, config.norm_eps
    places = [(row, column) for row in range(side) for column in range(side)]
    cut = [tile_3SS[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten() for r, c in places]
    x = torch.stack(cut) @ w["vision_model.patch_embedding.linear.weight"].T
    x = torch.cat([x, w["vision_model.class_embedding"][None]]) + w["vision_model.positional_embedding_vlm"]
    x = layer_norm(w, "vision_model.layernorm_pre", x, eps)
    for i in range(config.num_hidden_layers):
        name = f"vision_model.model.layers.{i}"
        x = x + vision_attention(w, config, name, layer_norm(w, f"{name}.input_layernorm", x, eps), places)
        normed = layer_norm(w, f"{name}.post_attention_layernorm", x, eps)
        hidden = gelu(normed @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"])
        x = x + hidden @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
    x = layer_norm(w, "vision_model.layernorm_post", x, eps)[:-1]
    factor = round(1 / config.pixel_shuffle_ratio)
    merged = []
    for row in range(0, side, factor):
        for column in range(0, side, factor):
            square = [(row + dy) * side + column + dx for dy in range(factor) for dx in range(factor)]
            merged.append(torch.cat([x[p] for p in square]))
    hidden = gelu(torch.stack(merged) @ w["vision_model.vision_adapter.mlp.fc1.weight"].T)
    hidden = gelu(hidden @ w["vision_model.vision_adapter.mlp.fc2.weight"].T)
    return hidden @ w["multi_modal_projector.linear_1.weight"].T


def vision_attention(w: Weights, config: VisionConfig, name: str, x: Tensor, places: list[tuple[int, int]]) -> Tensor:
    H, C = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def project(which: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.self_attn.{which}_proj.weight"].T + w[f"{name}.self_attn.{which}_proj.bias"]

    q, k, v = (project(which, x).view(-1, H, C) for which in "qkv")
    for p, (row, column) in enumerate(places):
        for pair in range(C // 2):
            at = pair % (C // 4)
            angle = (column + 1 if pair < C // 4 else row + 1) * config.rope_theta ** (-4 * at / C)
            cos, sin = math.cos(angle), math.sin(angle)
            rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
            for heads in (q, k):
                heads[p, :, 2 * pair : 2 * pair + 2] = heads[p, :, 2 * pair : 2 * pair + 2] @ rotation.T
    outputs = [(q[:, h] @ k[:, h].T / math.sqrt(C)).softmax(-1) @ v[:, h] for h in range(H)]
    return project("o", torch.cat(outputs, dim=-1))
