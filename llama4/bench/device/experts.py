"""One layer's routed experts by every backend, over the number of tokens: which is fastest on this card.

The sizes are Scout's and Maverick's. Tokens are spread evenly at random over the experts. `experts.json` gets the table
by which a backend could be chosen; nothing reads it yet:

    {"version": 1, "card": ..., "torch": ..., "triton": ..., "dtype": "bfloat16",
     "layers": [{"experts": 16, "hidden_size": 5120, "intermediate_size": 8192,
                 "milliseconds": {"grouped": {"1": 0.1, ...}, ...},
                 "fastest": {"1": "loop", ...},
                 "gemv": {"int4": {"8": [milliseconds of the kernel for few rows, of that for many]}, ...}}]}

Keys are numbers of tokens. "fastest" is among the backends of bfloat16, which have the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama4.bench import roofline
from llama4.bench.device import machine, timing, workload
from llama4.bench.device.record import Figures, Record, Skip
from llama4.config import TextConfig
from llama4.files import replace_text
from llama4.kernels.triton import launch_products
from llama4.model.experts import BACKENDS
from llama4.model.moe import MixtureOfExperts

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)
DRY_TOKENS = (1, 4, 32)
GEMV_TOKENS = (1, 2, 4, 8, 12, 16)
DENSE_ROWS = 1 << 18
"""Rows that transformers computes at most here, tokens times experts: its inputs alone are then 2.7 GB."""
SCHEMES = ("int4", "fp8", "int8")


def run(record: Record) -> None:
    table = Table(record.out / "experts.json", record.rates.get("name", str(record.device)))
    tokens = DRY_TOKENS if record.dry else TOKENS
    for preset in ("scout", "maverick"):
        text = workload.text_config(preset, layers=4, dry=record.dry)
        table.add(text)
        _unquantized(record, text, tokens, table)
        for scheme in SCHEMES:
            _packed(record, text, scheme, tokens, table)


class Table:
    """The file, written anew with every figure."""

    def __init__(self, path: Path, card: str) -> None:
        versions = machine.about()
        self.path = path
        self.content: dict[str, Any] = {
            "version": 1,
            "card": card,
            **{name: versions[name] for name in ("torch", "triton")},
            "dtype": "bfloat16",
            "layers": [],
        }

    def add(self, text: TextConfig) -> None:
        self.content["layers"].append(
            {
                "experts": text.num_local_experts,
                "hidden_size": text.hidden_size,
                "intermediate_size": text.intermediate_size,
                "milliseconds": {},
                "fastest": {},
                "gemv": {},
            }
        )

    def put(self, name: str, tokens: int, milliseconds: float) -> None:
        layer = self.content["layers"][-1]
        layer["milliseconds"].setdefault(name, {})[str(tokens)] = milliseconds
        alike = {
            n: own[str(tokens)] for n, own in layer["milliseconds"].items() if n in BACKENDS and str(tokens) in own
        }
        if alike:
            layer["fastest"][str(tokens)] = min(alike, key=lambda n: alike[n])
        self._write()

    def put_gemv(self, scheme: str, tokens: int, few: float, many: float) -> None:
        self.content["layers"][-1]["gemv"].setdefault(scheme, {})[str(tokens)] = [few, many]
        self._write()

    def _write(self) -> None:
        replace_text(self.path, json.dumps(self.content, indent=1) + "\n")


def _unquantized(record: Record, text: TextConfig, tokens: tuple[int, ...], table: Table) -> None:
    E, device = text.num_local_experts, record.device
    made: list[MixtureOfExperts] = []

    def layer() -> MixtureOfExperts:
        if not made:
            made.append(workload.moe_layer(text, device))
        return made[0]

    def module(name: str) -> nn.Module:
        if reason := BACKENDS[name].unsupported_reason(device, torch.bfloat16):
            raise Skip(reason)
        return workload.with_backend(layer(), text, name)

    for name in BACKENDS:
        if reason := BACKENDS[name].unsupported_reason(device, torch.bfloat16):
            record.case(f"{name}, {E} experts", partial(_skip, reason))
            continue
        for count in tokens:
            case = f"{name}, {E} experts, {count} tokens"
            figures = record.case(case, partial(_time, record, text, partial(module, name), count, None))
            if figures is not None:
                table.put(name, count, figures["ms"])
    record.profile(
        f"grouped, {E} experts, {tokens[-1]} tokens",
        lambda: partial(module("grouped"), *_inputs(text, tokens[-1], device)),
    )
    for count in tokens:
        if count * E <= DENSE_ROWS:
            record.case(
                f"whole layer, {E} experts, {count} tokens",
                partial(_beside_transformers, record, text, layer, partial(module, "grouped"), count),
            )
    made.clear()
    timing.release(device)


def _skip(reason: str) -> Figures:
    raise Skip(reason)


def _packed(record: Record, text: TextConfig, scheme: str, tokens: tuple[int, ...], table: Table) -> None:
    E, device = text.num_local_experts, record.device
    made: list[nn.Module] = []

    def module() -> nn.Module:
        if not made:
            made.append(workload.moe_layer(text, device, scheme).get_submodule("experts"))
        return made[0]

    for count in tokens:
        case = f"{scheme}, {E} experts, {count} tokens"
        figures = record.case(case, partial(_time, record, text, module, count, scheme))
        if figures is not None:
            table.put(scheme, count, figures["ms"])
    for count in DRY_TOKENS if record.dry else GEMV_TOKENS:
        case = f"{scheme}, {E} experts, {count} tokens: kernel for few rows or for many"
        figures = record.case(case, partial(_gemv, record, text, module, count))
        if figures is not None:
            table.put_gemv(scheme, count, figures["few_rows_ms"], figures["many_rows_ms"])
    record.profile(f"{scheme}, {E} experts, 1 token", lambda: partial(module(), *_inputs(text, 1, device)))
    made.clear()
    timing.release(device)


def _inputs(text: TextConfig, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x_RD = torch.randn(tokens, text.hidden_size, device=device).bfloat16()
    return x_RD, workload.spread(tokens, text.num_local_experts, device)


def _time(record: Record, text: TextConfig, made: Callable[[], nn.Module], tokens: int, scheme: str | None) -> Figures:
    """Eagerly and, where the host does not wait, in a CUDA graph."""
    experts = made()
    x_RD, counts_E = _inputs(text, tokens, record.device)
    run = partial(experts, x_RD, counts_E)
    spent = record.time(run, 0.1)
    figures: dict[str, float | None] = {"ms": spent * 1e3, "tokens_per_s": tokens / spent}
    in_graph = None
    if tokens <= 64 and timing.host_waits(run, record.device) == 0:
        in_graph = record.time(timing.graph(run, record.device), 0.1)
    figures["graph_ms"] = None if in_graph is None else in_graph * 1e3
    met = int(counts_E.count_nonzero())
    work = expert_work(text, experts, tokens, met)
    return figures | workload.shares(work, in_graph or spent, record.rates, "fp8" if scheme == "fp8" else "bf16")


def expert_work(text: TextConfig, experts: nn.Module, rows: int, met: int) -> roofline.Work:
    """The least for so many rows that meet so many experts."""
    stored = sum(parameter.nbytes for parameter in experts.parameters())
    flops = 2.0 * rows * 3 * text.hidden_size * text.intermediate_size
    return roofline.Work(flops, stored * met / text.num_local_experts)


def _gemv(record: Record, text: TextConfig, made: Callable[[], nn.Module], tokens: int) -> Figures:
    """The same rows by either Triton kernel."""
    if record.device.type != "cuda":
        raise Skip("not a GPU")
    run = partial(made(), *_inputs(text, tokens, record.device))
    spent = []
    for most in (1 << 20, 0):
        with most_gemv_rows(most):
            spent.append(record.time(timing.graph(run, record.device), 0.1) * 1e3)
    return {"few_rows_ms": spent[0], "many_rows_ms": spent[1]}


@contextmanager
def most_gemv_rows(rows: int) -> Iterator[None]:
    """Within, so many rows at most go through the kernel for few."""
    before = launch_products.MAX_GEMV_EXPERT_ROWS
    launch_products.MAX_GEMV_EXPERT_ROWS = rows
    try:
        yield
    finally:
        launch_products.MAX_GEMV_EXPERT_ROWS = before


def _beside_transformers(
    record: Record,
    text: TextConfig,
    made: Callable[[], MixtureOfExperts],
    made_grouped: Callable[[], nn.Module],
    tokens: int,
) -> Figures:
    """Router, experts and shared expert, ours with the grouped product, and transformers', which computes every expert
    for every token."""
    from llama4.bench.device import transformers_baseline

    x_ND = torch.randn(tokens, text.hidden_size, device=record.device).bfloat16()
    layer = made()
    theirs = transformers_baseline.moe_layer(layer, text)
    loop = layer.experts
    layer.experts = made_grouped()  # type: ignore[assignment]
    try:
        ours = record.time(partial(layer, x_ND), 0.1)
        error = workload.relative(layer(x_ND), theirs(x_ND)[0])
        spent = record.time(partial(theirs, x_ND), 0.1)
    finally:
        layer.experts = loop
    return {"ms": ours * 1e3, "transformers_ms": spent * 1e3, "times_slower": spent / ours, "difference": error}
