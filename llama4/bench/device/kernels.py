"""Compiles the Triton kernels of the steps to come, many at once, into Triton's cache on disk.

A compilation takes seconds on one core and needs no GPU; one after the other, they would take most of the time. Each is
asked for as the steps will ask, with tensors that have no data.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4.bench.device import attention, elementwise, experts, machine, workload
from llama4.bench.device.record import Figures, Record, Skip
from llama4.config import TextConfig
from llama4.kernels.triton import common, launch_attention, launch_products
from llama4.ops import quantized_gpu

WORKERS = 16


@dataclass(frozen=True)
class Product:
    """Rows times a matrix [O, I], or, sorted, times E of them.

    Attributes:
        kind: of the format; "bfloat16" for the experts of that, of Hopper alone.
        others: outputs of up to two more matrices, which the same launch multiplies.
    """

    kind: str
    rows: int
    outputs: int
    inputs: int
    experts: int | None = None
    group: int | None = None
    dtype: torch.dtype = torch.bfloat16
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """Attention of one token over a cache in a format."""

    kind: str


@dataclass(frozen=True)
class Between:
    """A kernel between matrix products, one of `elementwise.CASES`, at Scout's sizes."""

    name: str
    tokens: int


def run(record: Record) -> None:
    record.case("compiled ahead", lambda: _compile(record))


def _compile(record: Record) -> Figures:
    if reason := machine.triton_missing(record.device):
        raise Skip(reason)
    if record.device.type != "cuda":
        raise Skip("not a GPU")
    with multiprocessing.get_context("fork").Pool(min(WORKERS, os.cpu_count() or 1)) as pool:  # before CUDA starts here
        capability = torch.cuda.get_device_capability(record.device)
        wanted: list[Product | Step | Between] = [*map(Step, launch_attention.KINDS), *between(), *products()]
        tasks = [(kernel, 10 * capability[0] + capability[1]) for kernel in wanted]
        begin = time.perf_counter()
        reasons = [reason for reason in pool.imap_unordered(compile_one, tasks) if reason]
        spent = time.perf_counter() - begin
    return {"kernels": len(wanted), "compile_s": spent, "failed": len(reasons), "why": reasons[0] if reasons else ""}


def between() -> Iterator[Between]:
    """Those of one token, which alone has kernels of its own, and of more."""
    for name, case in elementwise.CASES.items():
        for tokens in (1, 16, 2048):
            if tokens <= case.most_tokens:
                yield Between(name, tokens)


def products() -> Iterator[Product]:
    """Those of the steps, the most needed first; each once."""
    yield from dict.fromkeys(_all_products())


def _all_products() -> Iterator[Product]:
    text = workload.text_config("scout", layers=4)
    for rows in (1, 4, 16, 2048, 16384):
        yield from _experts("bfloat16", text, rows)
    most_of_fp8 = launch_products.MAX_GEMV_EXPERT_ROWS  # more rows are torch's
    for kind, most in (("int4", 1 << 30), ("fp8", most_of_fp8)):
        for rows in (1, 2048, 4, 16):
            if rows <= most:
                yield from _layer(kind, text, rows)
    for kind in ("int4", "int8", "fp8"):
        for rows in (1, 8, 9, 100):
            yield Product(kind, rows, 2064, 5120, 4, 64 if kind == "int4" else None, torch.float32)
    for kind in ("bfloat16", "int4", "int8", "fp8"):
        for rows in (1, 3, 5, 40, 600, 4, 48, 2048, 16 * quantized_gpu.MIN_UNPACKED_ROWS):
            yield from _experts(kind, TextConfig(hidden_size=1024, intermediate_size=2048, num_local_experts=16), rows)
    for preset in ("scout", "maverick"):
        sizes = workload.text_config(preset, layers=4)
        for kind in ("bfloat16", "int4", "int8", "fp8"):
            for rows in (*experts.TOKENS, *experts.GEMV_TOKENS):
                yield from _experts(kind, sizes, rows)


def _layer(kind: str, text: TextConfig, rows: int) -> Iterator[Product]:
    D, F, C = text.hidden_size, text.intermediate_size, text.head_dim
    group = 128 if kind == "int4" else None
    yield from _experts(kind, text, rows)
    queries, keys = text.num_attention_heads * C, text.num_key_value_heads * C
    for outputs, inputs in ((queries, D), (keys, D), (D, queries), (F, D), (D, F)):
        yield Product(kind, rows, outputs, inputs, None, group)
    if rows <= launch_products.MAX_GEMV_ROWS:  # what a graph's step launches
        for outputs, *others in ((queries, keys, keys), (F, F)):
            yield Product(kind, rows, outputs, D, None, group, others=tuple(others))


def _experts(kind: str, text: TextConfig, rows: int) -> Iterator[Product]:
    D, F, E = text.hidden_size, text.intermediate_size, text.num_local_experts
    for outputs, inputs in ((2 * F, D), (D, F)):
        yield Product(kind, rows, outputs, inputs, E, 128 if kind == "int4" else None)


def compile_one(task: tuple[Product | Step | Between, int]) -> str | None:
    """In a process of its own, for a GPU of a compute capability, such as 90; -> why it failed, if it did."""
    kernel, capability = task
    try:
        _prepare(capability)
        if isinstance(kernel, Product):
            _ask_for(kernel)
        elif isinstance(kernel, Step):
            _ask_for_step(kernel)
        else:
            text = workload.text_config("scout", layers=1)
            elementwise.CASES[kernel.name].run(elementwise.Inputs(text, kernel.tokens, torch.device("meta")))
    except Exception as error:
        return f"{kernel}: {type(error).__name__}: {error}"[:300]
    return None


def _ask_for(product: Product) -> None:
    """Compile the kernel that this product would launch."""
    kind, I, is_fp8 = product.kind, product.inputs, product.kind == "fp8"  # noqa: E741
    if kind == "bfloat16":
        _ask_for_grouped(product)
        return
    x = torch.empty(product.rows, I, dtype=torch.uint8 if is_fp8 else product.dtype, device="meta")
    x_scales = torch.empty(product.rows, device="meta") if is_fp8 else None
    first, *others = (_matrix(product, outputs) for outputs in (product.outputs, *product.others))
    if others:
        launch_products.products(kind, x, [first, *others], x_scales_R=x_scales, dtype=product.dtype)
        return
    counts = torch.empty(product.experts, dtype=torch.int64, device="meta") if product.experts else None
    if quantized_gpu.unpacking_unsupported_reason(kind, x, first[1], counts) is None:
        launch_products.unpack(kind, *first)
        return
    launch_products.product(kind, x, *first, counts, x_scales_R=x_scales, dtype=product.dtype)


def _ask_for_grouped(product: Product) -> None:
    """The same of experts in bfloat16."""
    assert product.experts is not None
    x = torch.empty(product.rows, product.inputs, device="meta", dtype=torch.bfloat16)
    weights = torch.empty(product.experts, product.inputs, product.outputs, device="meta", dtype=torch.bfloat16)
    if common.gpu(x.device).capability // 10 == 9:
        launch_products.grouped_mm(x, torch.empty(product.experts, dtype=torch.int64, device="meta"), weights)


def _matrix(product: Product, outputs: int) -> tuple[Tensor, Tensor]:
    """Values and scales, without data."""
    I, leading = product.inputs, (product.experts,) if product.experts else ()  # noqa: E741
    in_row, groups = I // 8 if product.kind == "int4" else I, I // product.group if product.group else 1
    values = torch.empty(*leading, outputs, in_row, dtype=workload.VALUES_DTYPE[product.kind], device="meta")
    scales_dtype = torch.float32 if product.kind == "fp8" else torch.bfloat16
    return values, torch.empty(*leading, outputs, groups, dtype=scales_dtype, device="meta")


def _ask_for_step(step: Step) -> None:
    """Compile what a step would launch at the sizes of Scout, and a prompt."""
    rows, (H, K, C) = 2, attention.HEADS
    q, k, v = (torch.empty(rows, heads, C, dtype=torch.bfloat16, device="meta") for heads in (H, K, K))
    table, lengths = (torch.empty(*shape, dtype=torch.int64, device="meta") for shape in ((rows, 2), (rows,)))
    launch_attention.write(k, v, table, lengths, step.kind)
    launch_attention.write_run(k, v, table[0], 0, step.kind)
    for new in (None, (k, v, lengths)):
        launch_attention.attend(q, table, lengths, K, step.kind, new)


class Target:
    """In the place of a GPU's driver: kernels are compiled for it, and not run."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _prepare(capability: int) -> None:
    """From here on this process compiles and launches nothing."""
    import triton
    from triton.runtime.jit import JITFunction

    if isinstance(triton.runtime.driver._active, Target):
        return
    launched = JITFunction.run
    triton.runtime.driver._active = Target(capability)
    common.GPUS[torch.device("meta")] = common.Gpu(capability, multiprocessors=132)
    JITFunction.run = lambda *args, **kwargs: launched(*args, **kwargs | {"warmup": True})
