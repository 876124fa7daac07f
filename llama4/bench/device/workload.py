"""Models and layers with random weights, made where they are used: nothing is loaded, and nothing is quantized.

This is where the steps meet the rest of the library.

Shapes: B rows, T tokens, E experts, N tokens of a layer, R rows behind dispatch, D hidden size, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llama4.bench import roofline
from llama4.cache.sequence import SequenceCache
from llama4.config import PRESETS, Llama4Config, TextConfig
from llama4.engine.prefill import piece_size
from llama4.model.experts import BACKENDS
from llama4.model.moe import MixtureOfExperts
from llama4.model.multimodal import Llama4Model
from llama4.quantization.modules import swap_modules
from llama4.quantization.plan import QuantizationPlan, make_plan
from llama4.quantization.weight import QuantizedWeight
from llama4.vision.config import VisionConfig

VALUES_STD = {"int4": 4.6, "int8": 74.0, "fp8": 64.0}
"""Standard deviation of the quantized values that `fill` draws."""
VALUES_DTYPE = {"int4": torch.int32, "int8": torch.int8, "fp8": torch.uint8}
SMALL_VISION = VisionConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    vision_output_dim=64,
    projector_input_dim=64,
    projector_output_dim=64,
    image_size=56,
    max_tiles=16,
)


def text_config(preset: str, *, layers: int | None = None, dry: bool = False) -> TextConfig:
    """A preset's decoder, cut to its first layers; in a dry run also in every width."""
    text = PRESETS[preset]().text
    layers = min(4, layers or 4) if dry else layers or text.num_hidden_layers
    text = replace(text, num_hidden_layers=layers, moe_layers=None, layer_types=None, no_rope_layers=None)
    if not dry:
        return text
    return replace(
        text,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        intermediate_size_mlp=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=text.num_local_experts // 4,
        attention_chunk_size=64,
        floor_scale=64,
        bos_token_id=0,
        eos_token_id=(1,),
        pad_token_id=2,
    )


def config(text: TextConfig, *, vision: bool = False, dry: bool = False) -> Llama4Config:
    """With a vision tower or without; the last token of the vocabulary stands for images."""
    tower = (SMALL_VISION if dry else VisionConfig()) if vision else None
    return Llama4Config(text=text, vision=tower, image_token_index=text.vocab_size - 1)


def plan_for(scheme: str | None, model: nn.Module) -> QuantizationPlan:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return make_plan(scheme, shapes) if scheme is not None else {}


def build(
    config: Llama4Config,
    device: torch.device,
    scheme: str | None = None,
    experts: str = "auto",
    place: Callable[[str], torch.device] | None = None,
) -> tuple[Llama4Model, QuantizationPlan]:
    """A model in bfloat16 with random weights, and which of them are quantized.

    Args:
        experts: a backend's name; "auto" is the grouped product on a GPU, else the loop.
        place: where the parameter of a name is to be, if not on the device.
    """
    if experts == "auto":
        experts = "grouped" if device.type == "cuda" else "loop"
    with torch.device("meta"):
        model = Llama4Model(config, BACKENDS[experts])
    plan = plan_for(scheme, model)
    swap_modules(model, plan)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    fill(model, place or (lambda name: device))
    return model, plan


@torch.no_grad()
def fill(model: nn.Module, place: Callable[[str], torch.device]) -> None:
    """Allocate the parameters of a model on the meta device, and draw them: weights with variance 1 / inputs, so that
    nothing overflows, and quantized values from all that there are."""
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=place(full))
            if isinstance(module, QuantizedWeight) and name != "bias":
                _fill_packed(module, name, values)
                module.set_part(name, values)
                continue
            if name == "bias":
                values.zero_()
            elif "norm" in full:
                values.fill_(1)
            elif full.endswith(("experts.gate_up_proj", "experts.down_proj")):
                _normal(values, values.shape[1] ** -0.5)
            else:
                _normal(values, 1 if full.endswith("embed_tokens.weight") else values.shape[-1] ** -0.5)
            setattr(module, name, nn.Parameter(values, requires_grad=False))


def _normal(values: Tensor, std: float) -> None:
    """On a CPU, which draws slowly, large tensors repeat what was drawn."""
    if not values.is_cpu:
        values.normal_(0, std)
        return
    parts = values.view(-1).split(1 << 24)
    parts[0].normal_(0, std)
    for part in parts[1:]:
        part.copy_(parts[0][: len(part)])


def _fill_packed(module: QuantizedWeight, part: str, values: Tensor) -> None:
    if part == "weight_scale":  # powers of two, by which quantized values are multiplied exactly
        middle = -math.log2(VALUES_STD[module.format.kind] * module.shape[-1] ** 0.5)
        powers = torch.randint(-1, 2, values.shape, device=values.device) + round(middle)
        values.copy_(torch.exp2(powers.float()))
    elif values.dtype == torch.int32:
        values.random_(-(2**31), 2**31 - 1)
    elif values.dtype == torch.int8:
        values.random_(-127, 128)
    else:  # bytes of e4m3
        for some in values.view(torch.uint8).view(-1).split(1 << 26):
            numbers = torch.randn(len(some), device=some.device).mul_(VALUES_STD["fp8"]).clamp_(-448, 448)
            some.copy_(numbers.to(torch.float8_e4m3fn).view(torch.uint8))


def moe_layer(text: TextConfig, device: torch.device, scheme: str | None = None) -> MixtureOfExperts:
    """Router, routed experts and shared expert of one layer; unquantized ones with the backend "loop"."""
    one = replace(text, num_hidden_layers=1, vocab_size=64, moe_layers=(0,), layer_types=None, no_rope_layers=None)
    model, _ = build(Llama4Config(text=one, vision=None, image_token_index=-1), device, scheme, "loop")
    layer = model.language_model.model.layers[0].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    return layer


def with_backend(layer: MixtureOfExperts, text: TextConfig, name: str) -> nn.Module:
    """The routed experts of a layer, computed by another backend with the same parameters."""
    with torch.device("meta"):
        experts = BACKENDS[name](text)
    for part, parameter in layer.experts.named_parameters():
        setattr(experts, part, parameter)
    return experts


def spread(rows: int, experts: int, device: torch.device) -> Tensor:
    """How many of so many rows each expert gets, drawn evenly; [E] int64."""
    chosen = torch.randint(0, experts, (rows,), generator=torch.Generator().manual_seed(rows))
    return torch.bincount(chosen, minlength=experts).to(device)


def all_to(expert: int, rows: int, experts: int, device: torch.device) -> Tensor:
    counts_E = torch.zeros(experts, dtype=torch.int64)
    counts_E[expert] = rows
    return counts_E.to(device)


def ids(text: TextConfig, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Random tokens, none of which stands for an image, [B, T]."""
    drawn = torch.randint(0, text.vocab_size - 1, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    return drawn.to(device)


def read(model: Llama4Model, ids_BT: Tensor, cache: SequenceCache) -> Tensor:
    """Read prompts into a cache, in the pieces of generation; -> logits of the last tokens, [B, V]."""
    logits_B1V = torch.empty(0)
    for part_BT in ids_BT.split(max(1, piece_size(model) // len(ids_BT)), dim=1):
        logits_B1V = model(part_BT, cache=cache, last_only=True)
    return logits_B1V[:, -1]


def shares(work: roofline.Work, seconds: float, rates: Mapping[str, Any], kind: str = "bf16") -> dict[str, float]:
    """Of the floor, which is the longer of computing and reading at the rates that the card was seen to reach, and of
    its rate of a large product. Nothing where the rates are not known."""
    memory = max(rates.get("copy_gb_s", 0), rates.get("read_gb_s", 0)) * 1e9
    product = rates.get(f"{kind}_tflops", 0) * 1e12
    if not memory or not product:
        return {}
    floor = max(work.flops / product, work.bytes / memory)
    return {"roofline_share": floor / seconds, "share_of_gemm": work.flops / product / seconds}


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in float64; nan where a has no numbers."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()
