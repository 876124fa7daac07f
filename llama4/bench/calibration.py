"""The rates that this CPU reaches with a model's shapes, and the model itself measured: `llama4 plan --device cpu`.

The rates are measured on a probe, a part of the model with random weights: as many of its last layers as have a billion
parameters, and the same part of the head. So they include the formats of the weights and of the cache, and the kernels
that run here; a plan only has to count bytes and FLOP.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama4.analysis import costs
from llama4.analysis.hardware import Rates
from llama4.analysis.planner import Deployment
from llama4.api import Llama4
from llama4.bench.machine import OtherProcesses
from llama4.bench.process_memory import anonymous_bytes, bytes_read, peak_bytes, reset_peak, resident_bytes
from llama4.bench.report import DISTURBED
from llama4.cache.sequence import SequenceCache
from llama4.config import Llama4Config, TextConfig
from llama4.engine.prefill import PREFILL_TOKENS, prefill
from llama4.engine.runner import ModelRunner
from llama4.errors import Llama4Error
from llama4.inputs import Inputs
from llama4.model.device import DTYPES, resolve_dtype
from llama4.model.multimodal import Llama4Model
from llama4.progress import Bar, step
from llama4.quantization.modules import swap_modules
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.schemes import SCHEMES
from llama4.quantization.weight import QuantizedWeight
from llama4.units import bytes_text, time_text
from llama4.weights import memory

PROBE_PARAMETERS = 1 << 30
MOST_PARAMETERS = 1 << 31
"""Of a probe of one layer, which then has fewer experts."""
STEPS, PIECES, PASSES = 16, 3, 2
DISK_RUN, DISK_RUNS = 64 << 20, 8
NEAR = 16
"""Tokens of the short context after which steps are timed; the long one is `PIECES` pieces of a prompt."""


def measure_rates(setup: Deployment) -> Rates:
    """The rates of this CPU; takes some twenty seconds.

    Raises:
        Llama4Error: a single layer is too large for that.
    """
    config, dtype, cache_dtype = setup.config, setup.dtype, setup.cache_dtype
    text, probe_plan = probe(config.text, setup.plan)
    memory.reuse_freed()
    model = build(replace(config, text=text, vision=None, image_token_index=-1, dtype=dtype), probe_plan)
    share = text.num_local_experts / config.text.num_local_experts if text.moe_layers else 1.0
    piece = max(1, int(min(PREFILL_TOKENS, text.max_position_embeddings // (PIECES + 1)) * share))
    others = OtherProcesses()
    passes = []
    with Bar("measuring this CPU", PASSES + 1, "steps"):
        for _ in range(PASSES + 1):
            with step(1):
                passes.append(_pass(model, piece, cache_dtype))
    near, far, *pieces = (statistics.median(times) for times in zip(*passes[1:], strict=True))
    # Both contexts read the same weights: the difference is reading the cache.
    contexts = (NEAR + STEPS // 2, piece * PIECES + STEPS // 2)
    near_bytes, far_bytes = (costs.cache_bytes_read(text, n, dtype, cache_dtype) for n in contexts)
    weights = costs.weight_bytes_read(text, probe_plan, dtype)
    cache = (far_bytes - near_bytes) / (far - near) if far > near else weights / near
    # All pieces have the same matrix products: the difference is attention.
    ends = [costs.attention_flops(text, piece * i) for i in range(PIECES + 1)]
    spent = [after - before for before, after in pairwise(ends)]
    products = costs.prefill_flops(text, piece) - ends[1]
    attention = (spent[-1] - spent[0]) / max(pieces[-1] - pieces[0], 1e-9)
    rest = pieces[0] - spent[0] / attention
    if spent[-1] <= spent[0] or rest <= 0:  # too short for attention to show
        attention = (products + spent[0]) / pieces[0]
        rest = products / attention
    return Rates(
        memory=weights / max(near - near_bytes / cache, near / 2),
        cache=cache,
        products=products / rest,
        attention=attention,
        source=f"this CPU with {torch.get_num_threads()} threads, measured on {text.num_hidden_layers} of the model's "
        f"{config.text.num_hidden_layers} layers with random weights{_disturbance(others)}",
    )


def _disturbance(others: OtherProcesses) -> str:
    share = others.share() or 0.0
    return (
        f", while other processes used {share:.0%} of its cores: measure again without them"
        if share >= DISTURBED
        else ""
    )


def probe(text: TextConfig, plan: QuantizationPlan) -> tuple[TextConfig, QuantizationPlan]:
    """The model's last layers, up to `PROBE_PARAMETERS` but at least one, with the same part of the vocabulary; and
    their plan.

    Raises:
        Llama4Error: one layer is too large, with as many experts as a token needs.
    """
    total, kept = text.num_hidden_layers, text.num_hidden_layers
    while kept > 1 and _last_layers(text, kept).num_parameters() > PROBE_PARAMETERS:
        kept -= 1
    small = _last_layers(text, kept)
    while small.num_parameters() > MOST_PARAMETERS and small.num_local_experts > small.num_experts_per_tok:
        small = replace(small, num_local_experts=max(small.num_local_experts // 2, small.num_experts_per_tok))
    if small.num_parameters() > MOST_PARAMETERS:
        raise Llama4Error("a layer of this model is too large to be measured here; give --memory-rate and --gemm-rate")

    def renamed(match: re.Match[str]) -> str:
        return f".layers.{int(match[1]) - total + kept}."

    moved = {re.sub(r"\.layers\.(\d+)\.", renamed, name): format for name, format in plan.items()}
    return small, {name: moved[name] for name in costs.parameter_shapes(small, moved) if name in moved}


def _last_layers(text: TextConfig, kept: int) -> TextConfig:
    total = text.num_hidden_layers
    assert text.layer_types is not None
    assert text.no_rope_layers is not None
    return replace(
        text,
        num_hidden_layers=kept,
        vocab_size=-(-text.vocab_size * kept // total // 64) * 64,
        moe_layers=tuple(i - total + kept for i in text.moe_layers or () if i >= total - kept),
        layer_types=text.layer_types[total - kept :],
        no_rope_layers=text.no_rope_layers[total - kept :],
    )


def build(config: Llama4Config, plan: QuantizationPlan) -> Llama4Model:
    """A model with random weights."""
    with torch.device("meta"):
        model = Llama4Model(config)
    swap_modules(model, plan)
    model = model.to(DTYPES[config.dtype]).to_empty(device="cpu").eval().requires_grad_(False)
    noise = torch.randn(65521, generator=torch.Generator().manual_seed(0))
    packed = {id(p) for module in model.modules() if isinstance(module, QuantizedWeight) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if name.endswith("norm.weight"):
            flat.fill_(1)
        elif name.endswith("weight_scale"):
            flat.fill_(1e-4)
        elif id(parameter) in packed:
            values = noise.mul(20).abs().clamp(max=126).to(torch.uint8)  # a finite number in every format
            _tile(flat.view(torch.uint8), values)
        else:
            _tile(flat, (noise * config.text.hidden_size**-0.5).to(flat.dtype))
    return model


def _tile(flat: Tensor, pattern: Tensor) -> None:
    for begin in range(0, len(flat), len(pattern)):
        part = flat[begin : begin + len(pattern)]
        part.copy_(pattern[: len(part)])


@torch.inference_mode()
def _pass(model: Llama4Model, piece: int, cache_dtype: str) -> list[float]:
    """Seconds of a decoding step after a short context, after a long one, and of each piece of the long one."""
    ids = torch.randint(0, model.config.text.vocab_size, (1, piece), generator=torch.Generator().manual_seed(1))
    cache, runner = _new_cache(model, cache_dtype), ModelRunner(model)
    model(ids[:, :NEAR], cache=cache, last_only=True)
    near = _steps(runner, ids, cache)
    cache = _new_cache(model, cache_dtype)
    pieces = []
    for _ in range(PIECES):
        begin = time.perf_counter()
        model(ids, cache=cache, last_only=True)
        pieces.append(time.perf_counter() - begin)
    return [near, _steps(runner, ids, cache), *pieces]


def _steps(runner: ModelRunner, ids: Tensor, cache: SequenceCache) -> float:
    """Median seconds of a decoding step."""
    spent = []
    for i in range(STEPS):
        begin = time.perf_counter()
        runner.step(ids[:, i], cache)
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)


def _new_cache(model: Llama4Model, cache_dtype: str) -> SequenceCache:
    return model.new_cache(1, None if cache_dtype == "auto" else cache_dtype)


def disk_rate(directory: Path) -> float | None:
    """Bytes a second at which files of weights come from the disk, some tens of megabytes at a time, as experts do.
    What memory has of them is dropped first. None where no file is large enough, or the system cannot drop it.

    Raises:
        OSError: a file cannot be read.
    """
    sizes = {path: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    size, file = max(((size, path) for path, size in sizes.items()), default=(0, directory))
    runs = min(DISK_RUNS, size // DISK_RUN)
    if not runs or not hasattr(os, "posix_fadvise"):
        return None
    spent = []
    for i in range(runs):
        begin = size // runs * i
        with file.open("rb", buffering=0) as content:
            os.posix_fadvise(content.fileno(), begin, DISK_RUN, os.POSIX_FADV_DONTNEED)
            content.seek(begin)
            since = time.perf_counter()
            content.read(DISK_RUN)
            spent.append(time.perf_counter() - since)
    return DISK_RUN / statistics.median(spent)


def dtype_of(config: Llama4Config, weights: str) -> str:
    """The dtype that this CPU computes a model in."""
    asked = weights if weights == "bfloat16" else "auto"
    return str(resolve_dtype(asked, config, torch.device("cpu"))).removeprefix("torch.")


def measure_model(
    name: str, revision: str | None, subfolder: str | None, setup: Deployment, context: int
) -> dict[str, float | None]:
    """Load a model, prefill random tokens, and decode a few: seconds, bytes of the cache, the peak growth of this
    process in bytes, with and without mapped files, the bytes that a token reads from the disk, and the share of the
    cores that other processes used."""
    before, own_before = resident_bytes(), anonymous_bytes()
    reset_peak()
    scheme = setup.weights if setup.weights in SCHEMES else None
    llm = Llama4.from_pretrained(
        name, revision=revision, subfolder=subfolder, device="cpu", dtype=setup.dtype, quantization=scheme
    )
    model, generator = llm.model, torch.Generator().manual_seed(0)
    ids = torch.randint(0, llm.config.text.vocab_size, (1, max(context, STEPS)), generator=generator)
    ids[ids == llm.config.image_token_index] = 0  # it would need an image
    others = OtherProcesses()
    for tokens in (min(context, PREFILL_TOKENS), context):  # the first warms up
        cache = _new_cache(model, setup.cache_dtype)
        prompt = Inputs(ids[:, :tokens], torch.ones(1, tokens, dtype=torch.long), None)
        begin = time.perf_counter()
        prefill(model, prompt, cache, progress=True)
        seconds = time.perf_counter() - begin
    read_before = bytes_read()
    seconds_per_token = _steps(llm.runner, ids, cache)
    read = bytes_read()
    return {
        "cache_bytes": cache.num_bytes,
        "seconds_for_prompt": seconds,
        "seconds_per_token": seconds_per_token,
        "bytes_per_token": None if read is None or read_before is None else (read - read_before) / STEPS,
        "bytes": peak_bytes() - before,
        "own_bytes": anonymous_bytes() - own_before,
        "others": others.share(),
    }


def comparison(facts: dict[str, Any], setup: Deployment) -> str:
    """Planned and measured values, as lines of text. Of a model whose experts stay in files memory is what is not."""
    measured = facts["measured"]
    cached = costs.cache_bytes(setup.config.text, facts["context"], setup.dtype, setup.cache_dtype)
    planned, mapped = facts, facts.get("mapped_experts")
    rows = {"cache": ("cache_bytes", cached), "memory": ("bytes", facts["bytes_per_device"]["total"])}
    if mapped is not None:
        planned = mapped
        rows["memory"] = ("own_bytes", mapped["own_bytes"])
        if measured["bytes_per_token"]:
            rows["read for a token"] = ("bytes_per_token", mapped["bytes_per_token"])
    rows["time per token"] = ("seconds_per_token", planned["seconds_per_token"])
    rows["the whole prompt"] = ("seconds_for_prompt", planned["seconds_for_prompt"])
    lines = [f"  {'on this CPU':<18}{'planned':>12}{'measured':>12}{'planned / measured':>20}"]
    for label, (key, value) in rows.items():
        text = bytes_text if "bytes" in key else time_text
        lines.append(f"  {label:<18}{text(value):>12}{text(measured[key]):>12}{value / measured[key]:>20.2f}")
    if (measured["others"] or 0.0) >= DISTURBED:
        lines.append(f"  Other processes used {measured['others']:.0%} of the cores: measure again without them.")
    return "\n".join(lines)
