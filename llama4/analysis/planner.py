"""What fits where, and how long it takes: memory per device, the largest context, time per token and for the prompt.

Calculated from the configuration; nothing is allocated. docs/planning.md has the formulae and their sources.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llama4.analysis import costs, info
from llama4.analysis.hardware import Rates
from llama4.config import Llama4Config
from llama4.config.window import most_visible_tokens
from llama4.engine.prefill import prefill_tokens
from llama4.errors import ArgumentError, Llama4Error
from llama4.families import PRESETS
from llama4.quantization.plan import QuantizationPlan
from llama4.units import bytes_text, dtype_name, time_text
from llama4.weights import checkpoint, hub
from llama4.weights import memory as weights_memory

MOST_DEVICES = 1 << 14
"""The most devices that `remedies` proposes."""


@dataclass(frozen=True)
class Deployment:
    """A model on devices.

    Attributes:
        plan: quantized parameters -> their formats.
        weights: a name for that.
        dtype: of all other parameters, and of activations.
        cache_dtype: of the layers that see the whole context; see `costs.cache_bytes`.
        devices: how many.
        tensor_parallel: size of a group of devices that split every head, expert and dense layer. Groups are context
            parallel: each has all weights, and a share of what the layers that see the whole context have cached.
        device_memory: bytes of one device.
        device_type: torch's name of its kind.

    Raises:
        Llama4Error: a number of devices that cannot be divided so.
    """

    config: Llama4Config
    plan: QuantizationPlan
    weights: str
    dtype: str
    cache_dtype: str
    devices: int
    tensor_parallel: int
    device_memory: int
    device_type: str

    def __post_init__(self) -> None:
        heads = self.config.text.num_key_value_heads
        for name, value in (("devices", self.devices), ("device_memory", self.device_memory)):
            if value < 1:
                raise ArgumentError(f"{name} is {value}; it must be at least 1")
        if self.tensor_parallel < 1 or heads % self.tensor_parallel or self.devices % self.tensor_parallel:
            fitting = [t for t in range(1, heads + 1) if heads % t == self.devices % t == 0]
            raise ArgumentError(
                f"tensor_parallel is {self.tensor_parallel}; it must divide the {heads} key heads and the "
                f"{self.devices} devices: choose of {fitting}"
            )

    @property
    def context_parallel(self) -> int:
        return self.devices // self.tensor_parallel

    @property
    def prefill_tokens(self) -> int:
        """Most tokens of a prompt that go through the model at once."""
        return prefill_tokens(self.device_type, getattr(torch, self.dtype), self.config.text.head_dim)

    def on(self, devices: int) -> Deployment:
        """The same on so many devices, tensor parallel over as many of them as the key heads allow."""
        heads = self.config.text.num_key_value_heads
        return replace(self, devices=devices, tensor_parallel=math.gcd(devices, heads))


def read_model(
    name: str, revision: str | None = None, subfolder: str | None = None, *, weights: str = "auto"
) -> tuple[Llama4Config, QuantizationPlan]:
    """The configuration of a model and, with weights "auto", the formats that it is stored in: nothing but headers is
    read or fetched.

    Raises:
        Llama4Error: see `info.find`; or a quantized model whose files are not here, nor on a Hub that can be reached.
    """
    if name in PRESETS:
        return PRESETS[name](), {}
    directory = hub.resolve(name, revision=revision, subfolder=subfolder, select=lambda layout: layout.config_files)
    config = checkpoint.read_config(directory)
    is_gguf = directory.is_file()
    if weights != "auto" or (config.quantization_config is None and not is_gguf):
        return config, {}
    found = info.find(name, revision, subfolder=subfolder)
    if found.weights is None:
        raise Llama4Error(f"{name} is quantized, and how is in its files, which are not here; say it with --weights")
    return found.config, found.weights.plan


def make_deployment(
    config: Llama4Config,
    stored: QuantizationPlan | None = None,
    *,
    weights: str = "auto",
    dtype: str = "auto",
    cache_dtype: str = "auto",
    devices: int = 1,
    tensor_parallel: int | None = None,
    device_memory: int = 80 << 30,
    device_type: str = "cuda",
) -> Deployment:
    """A model on devices, from the options of `llama4 plan`.

    Args:
        stored: of a quantized model the formats of its files, see `read_model`.
        weights: "auto" (as stored), "bfloat16", or a scheme of quantization/schemes.py.
        dtype: of all other parameters; "auto" is the checkpoint's.
        tensor_parallel: by default over as many devices as the key heads allow.

    Raises:
        Llama4Error: an unknown scheme, or one this model is not for; a number of devices that cannot be divided so.
    """
    weights, cache_dtype = dtype_name(weights), dtype_name(cache_dtype)
    plan: QuantizationPlan = {}
    if weights == "auto" and stored:
        plan, weights = stored, "the formats it is stored in"
    elif weights not in ("auto", "bfloat16"):
        plan = costs.quantization_plan(config.text, weights)
    if dtype == "auto":
        dtype = "bfloat16" if weights == "bfloat16" else config.dtype
    label = dtype if weights in ("auto", "bfloat16") else weights
    whole = Deployment(config, plan, label, dtype, cache_dtype, 1, 1, device_memory, device_type)
    chosen = whole.on(devices)
    return chosen if tensor_parallel is None else replace(chosen, tensor_parallel=tensor_parallel)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        weights: scales of quantized parameters and the vision tower included.
        full_cache: keys and values of the layers that see the whole context, and of one picture of the most tiles where
            layers of cross-attention keep them.
        chunked_cache: of the layers with a window, chunked or sliding, when that is full.
        activations: of one piece of a prompt.
    """

    weights: float
    full_cache: float
    chunked_cache: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.full_cache + self.chunked_cache + self.activations


@dataclass(frozen=True)
class Times:
    """Seconds to decode one token after a context, and to read that context as a prompt; each the sum of two parts."""

    token_weights: float
    token_cache: float
    prompt_products: float
    prompt_attention: float

    @property
    def token(self) -> float:
        return self.token_weights + self.token_cache

    @property
    def prompt(self) -> float:
        return self.prompt_products + self.prompt_attention


def memory(deployment: Deployment, context: int) -> Memory:
    """The memory that a sequence of `context` tokens needs on each device."""
    text = deployment.config.text
    full = chunked = 0
    for i in text.self_layers:
        window = text.window(i)
        most = most_visible_tokens(context, window)
        held = costs.layer_cache_bytes(text, i, most, deployment.dtype, deployment.cache_dtype)
        full, chunked = (full + held, chunked) if window is None else (full, chunked + held)
    return Memory(
        weights=_per_device(deployment, lambda name: 1.0) + costs.vision_bytes(deployment.config, deployment.dtype),
        full_cache=(full + costs.picture_cache_bytes(deployment.config, deployment.dtype)) / deployment.devices,
        chunked_cache=chunked / deployment.tensor_parallel,
        activations=_activations(deployment, context),
    )


def _per_device(deployment: Deployment, share: Callable[[str], float]) -> float:
    """Bytes of the decoder's parameters on one device, each multiplied by `share(name)`. Matrices are split over the
    tensor parallel devices; routers, norms and biases are replicated."""
    sizes = costs.parameter_bytes(deployment.config.text, deployment.plan, deployment.dtype)
    replicated = ("router.weight", "norm.weight", ".bias")
    return sum(
        size * share(name) / (1 if name.endswith(replicated) else deployment.tensor_parallel)
        for name, size in sizes.items()
    )


def _activations(deployment: Deployment, context: int) -> float:
    """Bytes beside weights and cache while a piece of a prompt goes through a layer."""
    size = getattr(torch, deployment.dtype).itemsize
    per_token = deployment.config.text.activation_bytes(size, deployment.tensor_parallel)
    return min(context, deployment.prefill_tokens) * per_token


def usable(deployment: Deployment) -> float:
    """Bytes of a device that a model can use."""
    return weights_memory.usable(deployment.device_memory)


def fits(deployment: Deployment, context: int) -> bool:
    return memory(deployment, context).total <= usable(deployment)


def largest_context(deployment: Deployment) -> int:
    """The most tokens that fit, up to the model's context window; 0 if the weights alone do not."""
    low, high = 0, deployment.config.text.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(deployment, middle) else (low, middle - 1)
    return low


def times(deployment: Deployment, context: int, rates: Rates) -> Times:
    """How long it takes, communication between devices not counted.

    A token reads the weights it needs and the keys and values it sees. A prompt is read in pieces, divided among the
    context parallel groups: its matrix products take the time of their FLOPs or of reading the weights for every piece,
    whichever is longer; its attention takes the time of its FLOPs.
    """
    text = deployment.config.text
    cached = 0.0
    token = _per_device(deployment, lambda name: costs.share_per_token(text, name))
    for i in range(text.num_hidden_layers):
        token_bytes = costs.key_value_bytes(text, i, deployment.dtype, deployment.cache_dtype)
        ranks = deployment.devices if text.window(i) is None else deployment.tensor_parallel
        cached += text.visible_tokens(i, context) * token_bytes / ranks
    piece = min(context, deployment.prefill_tokens)
    pieces = context / max(piece, 1) / deployment.context_parallel
    read = _per_device(deployment, lambda name: min(1.0, piece * costs.share_per_token(text, name)))
    attention = costs.attention_flops(text, context)
    products = costs.prefill_flops(text, context) - attention
    return Times(
        token_weights=token / rates.memory,
        token_cache=cached / rates.cache,
        prompt_products=max(products / deployment.devices / rates.products, pieces * read / rates.memory),
        prompt_attention=attention / deployment.devices / rates.attention,
    )


def fp8_share(deployment: Deployment) -> float:
    """The share of the FLOPs of matrix products that is done in fp8."""
    flops = costs.parameter_flops(deployment.config.text)
    fp8 = {name for name, format in deployment.plan.items() if format is not None and format.rounds_inputs}
    return sum(n for name, n in flops.items() if name in fp8) / sum(flops.values())


def checked_context(deployment: Deployment, context: int | None) -> int:
    """The context that was asked for, by default the model's whole context window.

    Raises:
        Llama4Error: a longer context than the model takes.
    """
    window = deployment.config.text.max_position_embeddings
    if context is not None and not 1 <= context <= window:
        raise ArgumentError(f"a context of {context:,} tokens; this model takes from 1 to {window:,}, its window")
    return context or window


def remedies(deployment: Deployment, context: int) -> list[str]:
    """What makes a context fit that does not: options of `llama4 plan`, each sufficient by itself and the smallest
    change of its kind. More devices (doubled until it fits) come last, with fewer bits only if nothing else suffices.
    """
    caches = {"": deployment} | {f"--cache {name}": replace(deployment, cache_dtype=name) for name in ("fp8", "int4")}
    same = list(caches.items())
    fewer = [(f"--weights int4 {words}".strip(), _with_int4(changed)) for words, changed in same]
    if deployment.weights == "int4":
        fewer = same
    chosen = (next((words for words, changed in kind if fits(changed, context)), None) for kind in (same, fewer))
    found = [words for words in chosen if words]
    for words, changed in (same[0], fewer[-1]):
        devices = deployment.devices
        while (devices := 2 * devices) <= MOST_DEVICES:
            if fits(changed.on(devices), context):
                return [*found, f"{words} --devices {devices}".strip()]
        if found:
            break
    return found


def _with_int4(deployment: Deployment) -> Deployment:
    try:
        return replace(deployment, plan=costs.quantization_plan(deployment.config.text, "int4"), weights="int4")
    except ValueError:  # int4 does not suit this model's shapes
        return deployment


def describe(name: str, deployment: Deployment, context: int, rates: Rates) -> dict[str, Any]:
    """The figures of `llama4 plan`, ready for JSON; bytes, tokens, seconds."""
    need, spent = memory(deployment, context), times(deployment, context, rates)
    it_fits = fits(deployment, context)
    windows = [deployment.config.text.window(i) for i in deployment.config.text.self_layers]
    return {
        "model": name,
        "context": context,
        "window": deployment.config.text.max_position_embeddings,
        "weights": deployment.weights,
        "dtype": deployment.dtype,
        "cache": deployment.cache_dtype,
        "devices": deployment.devices,
        "tensor_parallel": deployment.tensor_parallel,
        "context_parallel": deployment.context_parallel,
        "device_memory": deployment.device_memory,
        "usable_memory": int(usable(deployment)),
        "full_layers": windows.count(None),
        "chunked_layers": len(windows) - windows.count(None),
        "bytes_per_device": {key: int(value) for key, value in asdict(need).items()} | {"total": int(need.total)},
        "fits": it_fits,
        "largest_context": largest_context(deployment),
        "remedies": [] if it_fits else remedies(deployment, context),
        "seconds_per_token": spent.token,
        "seconds_for_prompt": spent.prompt,
        "seconds": asdict(spent),
        "rates": asdict(rates),
    }


def table(facts: dict[str, Any]) -> str:
    """The figures as lines of text."""
    devices, need = facts["devices"], facts["bytes_per_device"]
    on = f"{devices} devices" if devices > 1 else "one device"
    heading = f"{facts['model']}, {facts['context']:,} tokens, weights in {facts['weights']}, "
    heading += f"cache in {facts['dtype'] if facts['cache'] == 'auto' else facts['cache']}, on {on} of "
    heading += bytes_text(facts["device_memory"])
    if devices > 1:
        heading += f" ({facts['tensor_parallel']} tensor parallel x {facts['context_parallel']} context parallel)"
    rows = {
        "weights": need["weights"],
        f"cache of {facts['full_layers']} layers that see all": need["full_cache"],
        f"cache of {facts['chunked_layers']} with a window": need["chunked_cache"],
        "activations": need["activations"],
        "together": need["total"],
    }
    lines = [heading, f"  {'':<34}{'per device':>12}{'in all':>12}"]
    lines += [f"  {name:<34}{bytes_text(n):>12}{bytes_text(n * devices):>12}" for name, n in rows.items()]
    lines.append(f"  {'fits' if facts['fits'] else 'DOES NOT FIT'} in {bytes_text(facts['usable_memory'])} per device")
    largest = facts["largest_context"]
    if not facts["fits"]:
        smaller = [f"--context {largest}"] if largest else []
        lines.append(f"  it would with     {', or '.join([*facts['remedies'], *smaller]) or 'nothing known here'}")
    whole = ", the whole window" if largest == facts["window"] else ""
    token, prompt = time_text(facts["seconds_per_token"]), time_text(facts["seconds_for_prompt"])
    part = {name: time_text(value) for name, value in facts["seconds"].items()}
    lines += [
        f"  largest context   {largest:,} tokens{whole}",
        f"  time per token    {token}: weights {part['token_weights']}, cache {part['token_cache']}",
        f"  the whole prompt  {prompt}: products {part['prompt_products']}, attention {part['prompt_attention']}",
    ]
    lines += textwrap.wrap(
        f"  rates             {facts['rates']['source']}", 110, subsequent_indent=" " * 20, break_on_hyphens=False
    )
    if devices > 1:
        lines.append("  not counted       what the devices tell each other")
    return "\n".join(lines)
