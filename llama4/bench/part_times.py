"""The time of each part of a model: of a forward by torch's profiler, of a decoding step by timing its matrix products.

A `PartTimes` has (part, operation) -> milliseconds and calls of one run.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from llama4.api import Llama4
from llama4.bench import roofline
from llama4.bench.model_parts import part_of
from llama4.bench.peak_rates import timed
from llama4.model.moe import Router
from llama4.ops import cpu_kernels
from llama4.ops.linear import linear, linear_in_out
from llama4.quantization.weight import QuantizedWeight

PartTimes = dict[tuple[str, str], list[float]]
MARK = "part: "


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Within, hooks tell the profiler which module runs. Modules inside a packed matrix have no mark of their own."""
    open_marks: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            mark = record_function(MARK + part_of(name))
            mark.__enter__()
            open_marks.append(mark)

        return hook

    def leave(*_: object) -> None:
        open_marks.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            inside_experts = name.rpartition(".")[0].endswith(".experts")
            if isinstance(module, (nn.ModuleList, nn.Embedding)) or inside_experts or name.startswith("vision"):
                continue
            hooks.enter_context(module.register_forward_pre_hook(enter(name)))
            hooks.enter_context(module.register_forward_hook(leave))
        yield


def profile_parts(model: nn.Module, run: Callable[[], object], repeats: int) -> PartTimes:
    """By torch's profiler. The project's own kernels and Python are the operation "own kernels, Python"."""
    with _marked(model):
        run()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(repeats):
                run()
    times: PartTimes = defaultdict(lambda: [0.0, 0.0])
    for event in profiled.events():
        if not event.self_cpu_time_total:
            continue
        owner = event
        while owner is not None and not owner.name.startswith(MARK):
            owner = owner.cpu_parent
        if owner is None:
            continue
        operation = "own kernels, Python" if event is owner else event.name.removeprefix("aten::")
        entry = times[owner.name.removeprefix(MARK), operation]
        entry[0] += event.self_cpu_time_total / 1000 / repeats
        entry[1] += 1 / repeats
    return dict(times)


@torch.inference_mode()
def time_products(llm: Llama4, repeats: int) -> PartTimes:
    """Medians, one product at a time, less the overhead of a call from Python; the operation is "".

    All layers run in order, so that every matrix comes from memory as in a step.
    """
    todo = list(products(llm))
    overhead = _call_overhead(llm)
    samples: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, float] = defaultdict(float)
    for turn in range(repeats + 1):
        spent: dict[str, float] = defaultdict(float)
        for part, call in todo:
            spent[part] += max(timed(call) - overhead, 0.0)
            calls[part] += turn == 0
        for part, seconds in spent.items():
            samples[part] += [seconds * 1e3] if turn else []
    return {(part, ""): [statistics.median(spent), calls[part]] for part, spent in samples.items()}


def products(llm: Llama4) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The matrix products of a decoding step of one row, in order: the part, and a call that computes it. Of routed
    experts the first ones."""
    rows: dict[int, Tensor] = {}

    def row(width: int) -> Tensor:
        if width not in rows:
            rows[width] = torch.randn(1, width).to(llm.model.device, llm.model.dtype)
        return rows[width]

    def through(linear: nn.Module, width: int) -> Callable[[], Tensor]:
        if isinstance(linear, Router):  # its own forward casts the weights to float32; a decoding step does not
            return partial(_product, row(width), linear.weight)
        return lambda: linear(row(width))

    for name, shape in roofline.matrices(llm.config.text).items():
        path, part = name.removesuffix(".weight"), part_of(name.removesuffix(".weight"))
        if len(shape) == 2:
            yield part, through(llm.model.get_submodule(path), shape[1])
            continue
        owner, _, leaf = path.rpartition(".")
        weight: Any = getattr(llm.model.get_submodule(owner), leaf)
        for expert in range(llm.config.text.num_experts_per_tok):
            call = partial(weight.product, row(shape[1]), expert) if isinstance(weight, QuantizedWeight) else None
            yield part.rpartition(".")[0], call or partial(linear_in_out, row(shape[1]), weight[expert])


def _call_overhead(llm: Llama4) -> float:
    """Seconds of a tiny product."""
    weight = torch.randn(16, 512).to(llm.model.device, llm.model.dtype)
    x = weight[:1].clone()
    return min(timed(lambda: _product(x, weight)) for _ in range(200))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """By the CPU kernel where there is one, however small the matrix is."""
    with cpu_kernels.any_size():
        return linear(x, weight)
