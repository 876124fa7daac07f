"""What fine-tuning takes: memory per device, the fewest devices, tokens a second. docs/planning.md has the formulae.

The formulae are those of `llama4.train.memory`. Activations are counted there in two small forwards. Of a model that is
not here they are counted of narrow ones, with its number of heads and experts and a random layer of each of its kinds:
what a layer keeps of a token grows in a line with the model's widths, as it does with the tokens.

Shapes: D hidden size, F expert width, I inputs, O outputs, E experts, r rank.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llama4.adapters.config import LoraConfig, target_of
from llama4.adapters.lora import TIED, Adapter
from llama4.analysis import costs
from llama4.analysis.hardware import Rates
from llama4.analysis.planner import MOST_DEVICES, Deployment, usable
from llama4.config import Llama4Config, TextConfig
from llama4.errors import ArgumentError
from llama4.families.names import HEAD
from llama4.model.device import DTYPES
from llama4.model.multimodal import Llama4Model
from llama4.progress import Bar
from llama4.train.memory import (
    PROBES,
    Estimate,
    Kept,
    along_line,
    kept_bytes,
    logit_bytes,
    step_bytes,
    trained_bytes,
)
from llama4.train.options import QUANTIZATION
from llama4.units import bytes_text, count_text, time_text

NARROWEST = 64
"""The most by which widths are divided for the forwards that are counted."""
MIN_TOKENS = 2
"""Of an example: the second is learnt."""
BACKWARD_ATTENTION = 2.5
"""FLOPs of attention's backward pass for one of its forward: five products for two (Dao 2023, "FlashAttention-2",
section 4.1)."""


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        method: one of `PLANNED`.
        lora: of those that train an adapter.
        batch_tokens: of a batch, on each device.
        length: tokens of an example, as far as attention is concerned.
        optimizer_states: see `TrainingOptions`.

    Raises:
        ArgumentError: targets that are not of the decoder.
    """

    method: str
    lora: LoraConfig
    batch_tokens: int
    length: int
    optimizer_states: str = "float32"

    def __post_init__(self) -> None:
        if pictures := {"vision", "projector"} & set(self.lora.targets):
            raise ArgumentError(f"target {min(pictures)!r}: pictures are not planned; leave it out")
        if min(self.batch_tokens, self.length) < MIN_TOKENS:
            raise ArgumentError(
                f"a batch of {self.batch_tokens} tokens in examples of {self.length}; give at least {MIN_TOKENS}"
            )


def adapter_shapes(text: TextConfig, lora: LoraConfig) -> dict[str, tuple[int, int, int, int]]:
    """What an adapter changes: name -> (E, r, I, O), with E = 1 where there are no experts.

    Raises:
        ArgumentError: nothing that the model has, or tied embeddings.
    """
    if "embeddings" in lora.targets and text.tie_word_embeddings:
        raise ArgumentError(TIED)
    shapes: dict[str, tuple[int, int, int, int]] = {}
    for parameter, shape in costs.parameter_shapes(text).items():
        name = parameter.removesuffix(".weight")
        target = target_of(name)
        if target not in lora.targets:
            continue
        *experts, first, second = shape
        shapes[name] = (math.prod(experts), lora.rank_of(target), first, second)
    if not shapes:
        raise ArgumentError(f"this model has no {' and no '.join(lora.targets)}; choose other targets")
    return shapes


def num_trained(config: Llama4Config, training: Training) -> int:
    """Numbers that are trained."""
    if training.method == "full":
        return config.num_parameters()
    return sum(
        E * r * (inputs + outputs) for E, r, inputs, outputs in adapter_shapes(config.text, training.lora).values()
    )


def _largest(text: TextConfig, training: Training) -> int:
    """Numbers of the largest parameter that is trained."""
    if training.method == "full":
        return max(map(math.prod, costs.parameter_shapes(text).values()))
    return max(E * r * max(inputs, outputs) for E, r, inputs, outputs in adapter_shapes(text, training.lora).values())


@dataclass(frozen=True)
class Activations:
    """What autograd keeps of a batch, counted in small forwards of narrow models.

    Attributes:
        factor: the most by which widths were divided.
        counted: of a model so narrow, and if it is more than 1 of one twice as wide, at the two `PROBES`.
    """

    factor: int
    counted: tuple[tuple[Kept, Kept], ...]

    def of(self, tokens: int, recomputed: bool) -> tuple[int, int]:
        """Bytes that are kept of a batch, and bytes of a layer that is computed again, with gradient checkpointing."""

        def at_full_width(size: Callable[[Kept], int]) -> int:
            narrow, *wider = (along_line(size(small), size(large), tokens) for small, large in self.counted)
            if not wider:
                return narrow
            return round(narrow + (self.factor - 1) * (wider[0] - narrow))  # a + b / f, the difference is b / f

        return at_full_width(lambda of: of.total(recomputed)), at_full_width(lambda of: of.layer(recomputed))


def count_activations(text: TextConfig, training: Training, dtype: str) -> Activations:
    factor = _divisor(text)
    factors = sorted({factor, max(1, factor // 2)}, reverse=True)
    with Bar("counting activations", len(factors) * len(PROBES), "steps") as bar:

        def kept(factor: int, tokens: int) -> Kept:
            with bar.step(1):
                return _kept(text, training, dtype, factor, tokens)

        return Activations(factor, tuple((kept(f, PROBES[0]), kept(f, PROBES[1])) for f in factors))


def _divisor(text: TextConfig) -> int:
    """What all widths can be divided by, so that rows are still multiples of eight and heads even."""
    widths = [text.hidden_size, text.intermediate_size, text.intermediate_size_mlp]
    factor = 1
    while (
        factor < NARROWEST and all(width % (16 * factor) == 0 for width in widths) and not text.head_dim % (4 * factor)
    ):
        factor *= 2
    return factor


def _kept(text: TextConfig, training: Training, dtype: str, factor: int, tokens: int) -> Kept:
    """What autograd keeps of so many tokens, with widths divided by a factor."""
    kinds = [
        (text.window(i), text.uses_rope(i), text.uses_experts(i), text.is_cross(i))
        for i in range(text.num_hidden_layers)
    ]
    # the first layer is one of its own: nothing that comes before it is trained
    chosen = [0, *(kinds.index(kind, 1) for kind in dict.fromkeys(kinds[1:]))]
    model = Llama4Model(_narrow(text, factor, chosen)).to(DTYPES[dtype])
    for name, parameter in model.named_parameters():  # of values only those count that send tokens to experts
        if name.endswith(("embed_tokens.weight", "router.weight")):
            nn.init.normal_(parameter)
        else:
            nn.init.constant_(parameter, float(parameter.ndim == 1))  # norms pass on what they get
    model.requires_grad_(training.method == "full")
    if training.method == "full":
        kept = kept_bytes(model, dict(model.named_parameters()), tokens)
    else:
        adapter = Adapter.create(model, training.lora).train()
        adapter.attach(model)
        kept = kept_bytes(model, dict(adapter.named_parameters()), tokens)
    first, *others = kept.layers
    of_kind = dict(zip(dict.fromkeys(kinds[1:]), others, strict=True))
    layers = [first, *(of_kind[kind] for kind in kinds[1:])]
    return Kept(kept.outside, layers, kept.inputs * len(kinds) // len(chosen), kept.head)


def _narrow(text: TextConfig, factor: int, layers: list[int]) -> Llama4Config:
    assert text.no_rope_layers is not None and text.layer_types is not None
    narrow = replace(
        text,
        vocab_size=256,
        extra_embeddings=0,
        tie_word_embeddings=False,
        hidden_size=text.hidden_size // factor,
        intermediate_size=text.intermediate_size // factor,
        intermediate_size_mlp=text.intermediate_size_mlp // factor,
        head_dim=text.head_dim // factor,
        rope_scaling=None,
        num_hidden_layers=len(layers),
        moe_layers=tuple(at for at, layer in enumerate(layers) if text.uses_experts(layer)),
        no_rope_layers=tuple(text.no_rope_layers[layer] for layer in layers),
        layer_types=tuple(text.layer_types[layer] for layer in layers),
    )
    return Llama4Config(narrow, None, 255, 254, 253, dtype="float32")


@dataclass(frozen=True)
class Needs:
    """Bytes on each device, of which every one has its share of weights, gradients and states (fully sharded), and
    experts where they are: tokens go to them (expert parallel).

    Attributes:
        weights: its share.
        gathered: the largest part that is put together to be computed with, and its gradients if it is trained: a
            layer without its routed experts, the embeddings or the head; 0 on one device, which has all.
        training: what is trained with gradients and states, its share, and what a batch takes.
    """

    weights: float
    gathered: float
    training: Estimate

    @property
    def total(self) -> float:
        return self.weights + self.gathered + self.training.to_come


def needs(deployment: Deployment, training: Training, kept: tuple[int, int]) -> Needs:
    """What a device needs.

    Args:
        kept: of `Activations`.
    """
    config, N = deployment.config, deployment.devices
    text, size = config.text, getattr(torch, deployment.dtype).itemsize
    is_full, trained = training.method == "full", num_trained(config, training)
    states = trained_bytes(trained, size if is_full else 4, training.optimizer_states, is_added=not is_full)
    head_trained = math.prod(costs.parameter_shapes(text).get(HEAD, (0,))) if is_full else 0
    if "embeddings" in training.lora.targets and not is_full:
        _, r, outputs, inputs = adapter_shapes(text, training.lora)[HEAD.removesuffix(".weight")]
        head_trained = r * (inputs + outputs)
    of_batch = Estimate(
        round(states / N),
        kept[0],
        logit_bytes(text.vocab_size, training.batch_tokens, head_trained),
        kept[1],
        step_bytes(math.ceil(_largest(text, training) / N)),
    )
    gathered = 0.0 if N == 1 else _gathered(deployment) * (1 + is_full)
    return Needs(costs.weight_bytes(config, deployment.plan, deployment.dtype) / N, gathered, of_batch)


def _gathered(deployment: Deployment) -> int:
    """Bytes of the largest part of the model but routed experts."""
    parts: Counter[str] = Counter()
    for name, size in costs.parameter_bytes(deployment.config.text, deployment.plan, deployment.dtype).items():
        if ".experts." not in name:
            _, found, after = name.partition(".layers.")
            parts[after.partition(".")[0] if found else name] += size
    return max(parts.values())


def fits(deployment: Deployment, training: Training, kept: tuple[int, int]) -> bool:
    return needs(deployment, training, kept).total <= usable(deployment)


def fewest_devices(deployment: Deployment, training: Training, kept: tuple[int, int]) -> int | None:
    """How many such devices it takes, doubled until it fits; None if no number does."""
    devices = 1
    while devices <= MOST_DEVICES:
        if fits(deployment.on(devices), training, kept):
            return devices
        devices *= 2
    return None


def fitting_batch(deployment: Deployment, training: Training, activations: Activations, recomputed: bool) -> int | None:
    """Tokens of a batch that fits on each of these devices, halved until it does; None if none does."""
    tokens = training.batch_tokens
    while tokens >= MIN_TOKENS:
        if fits(deployment, replace(training, batch_tokens=tokens), activations.of(tokens, recomputed)):
            return tokens
        tokens //= 2
    return None


def flops_per_token(text: TextConfig, training: Training, recomputed: bool) -> tuple[float, float]:
    """FLOPs of products and of attention of a token of a step.

    A product costs as much forward as for the gradient of its inputs, and for that of its matrix, which only what is
    trained has. With gradient checkpointing the layers go forward twice.
    """
    forward = costs.parameter_flops(text)
    head = forward.get(HEAD, 0.0)
    base = sum(forward.values())
    if training.method == "full":
        products, again = 3 * base, base - head
    else:
        k = text.num_experts_per_tok
        shapes = adapter_shapes(text, training.lora).values()
        added = sum(2 * min(E, k) * r * (inputs + outputs) for E, r, inputs, outputs in shapes)
        products, again = 2 * base + 3 * added, base - head + added
    attention = costs.attention_flops(text, training.length) / training.length
    return products + again * recomputed, attention * (1 + BACKWARD_ATTENTION + recomputed)


def tokens_per_second(deployment: Deployment, training: Training, recomputed: bool, rates: Rates) -> float:
    """Of all devices together, what they tell each other not counted."""
    products, attention = flops_per_token(deployment.config.text, training, recomputed)
    return deployment.devices / (products / rates.products + attention / rates.attention)


def describe(name: str, deployment: Deployment, training: Training, rates: Rates) -> dict[str, Any]:
    """The figures of `llama4 plan --finetune`, ready for JSON; bytes, tokens, seconds."""
    activations = count_activations(deployment.config.text, training, deployment.dtype)
    ways = {}
    for recomputed, word in ((False, "plain"), (True, "gradient_checkpointing")):
        kept = activations.of(training.batch_tokens, recomputed)
        need = needs(deployment, training, kept)
        batch = need.training
        ways[word] = {
            "bytes_per_device": {
                "weights": int(need.weights),
                "gathered": int(need.gathered),
                "trained": batch.trained,
                "activations": batch.activations,
                "layer": batch.layer,
                "logits": batch.logits,
                "step": batch.step,
                "total": int(need.total),
            },
            "fits": fits(deployment, training, kept),
            "fewest_devices": fewest_devices(deployment, training, kept),
            "fitting_batch_tokens": fitting_batch(deployment, training, activations, recomputed),
            "tokens_per_second": tokens_per_second(deployment, training, recomputed, rates),
        }
    lora = training.lora
    return {
        "model": name,
        "method": training.method,
        "weights": deployment.weights,
        "dtype": deployment.dtype,
        **({} if training.method == "full" else {"rank": lora.rank, "targets": list(lora.targets)}),
        "optimizer_states": training.optimizer_states,
        "batch_tokens": training.batch_tokens,
        "length": training.length,
        "parameters": deployment.config.num_parameters(),
        "trained": num_trained(deployment.config, training),
        "devices": deployment.devices,
        "device_memory": deployment.device_memory,
        "usable_memory": int(usable(deployment)),
        "ways": ways,
        "rates": rates.source,
    }


def table(facts: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    devices, ways = facts["devices"], facts["ways"]
    on = f"{devices} devices" if devices > 1 else "one device"
    lora = f"rank {facts['rank']} on {', '.join(facts['targets'])}; " if "rank" in facts else ""
    share = 100 * facts["trained"] / facts["parameters"]
    lines = textwrap.wrap(
        f"{facts['model']}, --method {facts['method']}: {lora}{count_text(facts['trained'])} parameters trained, "
        f"{share:.3g}% of the model's; weights in {facts['weights']}, optimizer states in {facts['optimizer_states']}; "
        f"{facts['batch_tokens']:,} tokens a batch and device, in examples of {facts['length']:,}; on {on} of "
        f"{bytes_text(facts['device_memory'])}",
        110,
    )
    lines.append(f"  {'':<46}{'per device':>14}{'with gradient checkpointing':>30}")
    rows = {
        "weights": "weights",
        "gathered": "the largest part, put together",
        "trained": "what is trained, gradients, optimizer states",
        "activations": "activations",
        "layer": "of a layer that is computed again",
        "logits": "logits of a slice",
        "total": "together",
    }

    def row(title: str, texts: list[str]) -> str:
        return f"  {title:<46}{texts[0]:>14}{texts[1]:>30}"

    for key, title in rows.items():
        sizes = [way["bytes_per_device"][key] for way in ways.values()]
        if any(sizes):
            lines.append(row(title, [bytes_text(size) if size else "" for size in sizes]))
    usable_text = bytes_text(facts["usable_memory"])
    lines.append(
        row(f"of {usable_text} per device", ["fits" if way["fits"] else "DOES NOT FIT" for way in ways.values()])
    )
    fewest, batches = ([way[key] for way in ways.values()] for key in ("fewest_devices", "fitting_batch_tokens"))
    lines.append(
        row("fewest devices (1, 2, ...), this batch on each", [f"{n:,}" if n else "no number" for n in fewest])
    )
    is_short = not all(way["fits"] for way in ways.values())
    if is_short:
        lines.append(row("a batch that fits, halved until it does", [f"{n:,}" if n else "none" for n in batches]))
    speeds = [way["tokens_per_second"] for way in ways.values()]
    lines.append(row("tokens a second, of all", [f"{speed:,.0f}" for speed in speeds]))
    lines.append(row("a million tokens", [time_text(1e6 / speed) for speed in speeds]))
    lines += textwrap.wrap(
        f"  rates             {facts['rates']}", 110, subsequent_indent=" " * 20, break_on_hyphens=False
    )
    if is_short:
        lines.append(
            "  more devices      share weights and what is trained; activations are of a batch that each has to itself"
        )
    lines.append(f"  not counted       {'what the devices tell each other; ' if devices > 1 else ''}pictures")
    return "\n".join(lines)


def weights_of(method: str, given: str, is_packed: bool = False) -> str:
    """The weights that a method is planned with, of a model that is packed already or not.

    Raises:
        ArgumentError: packed weights, which method "full" does not train.
    """
    if method == "full" and given not in ("auto", "bfloat16"):
        raise ArgumentError(f"--weights {given}: packed weights are not trained; plan --finetune qlora")
    if method == "full" and given == "auto" and is_packed:
        raise ArgumentError("this model's weights are packed, and packed weights are not trained; plan --finetune lora")
    return QUANTIZATION if method == "qlora" and given == "auto" and not is_packed else given
