"""The experts' backends over tokens per expert, beside what the machine can do at most.

`llama4 bench moe [MODEL] [--dtype bfloat16] [--tokens 1 4 16 64 256] [--json | --markdown]`

One layer's routed experts with random weights, of the sizes of MODEL or of those given. Tokens are spread evenly, or
all sent to one expert, another one in every run, so that its weights come from memory as they do in a model. All
backends take turns; medians of runs that are warm.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llama4.analysis.costs import stored_bytes
from llama4.analysis.info import read_config
from llama4.bench import roofline
from llama4.bench.machine import Ceilings, Others, Rates, describe, timed
from llama4.bench.report import (
    Spread,
    add_output_options,
    add_threads,
    number,
    positive,
    shown,
    table,
    warn_of_others,
)
from llama4.config import TextConfig
from llama4.model.device import DTYPES
from llama4.model.experts import BACKENDS, backends_for
from llama4.quantization.modules import PACKED, PackedExperts
from llama4.quantization.schemes import SCHEMES, Format, make_plan

EVEN, ONE = "evenly", "all to one"


@dataclass
class Figure:
    """Milliseconds of one backend, and shares of the floor, for so many tokens per expert on average."""

    backend: str
    spread: str
    tokens_per_expert: int
    samples: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def make_backends(
    text: TextConfig, dtype: torch.dtype, names: Sequence[str]
) -> dict[str, tuple[nn.Module, dict[str, Format]]]:
    """Name -> experts with the same random weights, and the formats of the packed ones.

    Raises:
        ValueError: a backend cannot run in this dtype, or a format cannot hold these sizes.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in BACKENDS["loop"](text).named_parameters()}
    weights = {
        name: torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(dtype) for name, shape in shapes.items()
    }
    found: dict[str, tuple[nn.Module, dict[str, Format]]] = {}
    for name in names:
        if name in BACKENDS:
            if reason := BACKENDS[name].unsupported_reason(torch.device("cpu"), dtype):
                raise ValueError(f"the backend {name!r} cannot run here: {reason}")
            with torch.device("meta"):
                experts: nn.Module = BACKENDS[name](text)
            for part, weight in weights.items():
                setattr(experts, part, nn.Parameter(weight, requires_grad=False))
            found[name] = experts, {}
            continue
        at = "language_model.model.layers.0.feed_forward.experts."
        plan = {
            parameter.removeprefix(at): format
            for parameter, format in make_plan(name, {f"{at}{part}": shape for part, shape in shapes.items()}).items()
        }
        experts = PackedExperts()
        for part, weight in weights.items():
            packed = PACKED[plan[part].kind]
            shape = (weight.shape[0], weight.shape[2], weight.shape[1])
            with torch.device("meta"):
                module = packed(plan[part], shape)
            stacks = [packed.quantize(expert.mT, plan[part]) for expert in weight]
            for key in packed.parts:
                whole = torch.stack([stack[key] for stack in stacks])
                lying = module.for_cpu(key, whole).reshape(whole.shape)
                setattr(module, key, nn.Parameter(lying, requires_grad=False))
            setattr(experts, part, module)
        found[name] = experts, plan
    return found


def work(text: TextConfig, plan: dict[str, Format], dtype: torch.dtype, rows: int, experts: int) -> roofline.Work:
    """The least for so many rows that meet so many experts."""
    E, D, F = text.num_local_experts, text.hidden_size, text.intermediate_size
    shapes = {"gate_up_proj": (E, D, 2 * F), "down_proj": (E, F, D)}
    read = sum(stored_bytes(shape, plan.get(part), dtype.itemsize) for part, shape in shapes.items())
    return roofline.Work(2 * rows * 3 * D * F, read * experts / E)


def measure(
    text: TextConfig, dtype: torch.dtype, names: Sequence[str], tokens: Sequence[int], rounds: int, threads: int
) -> tuple[list[Figure], list[Rates]]:
    backends = make_backends(text, dtype, names)
    E, generator = text.num_local_experts, torch.Generator().manual_seed(1)
    ceilings, rates, figures = Ceilings(dtype, threads), list[Rates](), list[Figure]()
    cases = [(spread, per_expert) for spread in (EVEN, ONE) for per_expert in tokens]
    for spread, per_expert in shown(cases, lambda case: f"{case[1]} tokens per expert, {case[0]}"):
        rows = per_expert * E
        x_ND = torch.randn(rows, text.hidden_size, generator=generator).to(dtype)
        own = {name: Figure(name, spread, per_expert) for name in backends}
        for turn in range(-1, rounds):
            counts_E = torch.full((E,), per_expert) if spread == EVEN else _all_to(turn % E, rows, E)
            rates.append(ceilings.measure())
            for name, (experts, plan) in backends.items():
                milliseconds = 1e3 * timed(partial(_run, experts, x_ND, counts_E))
                if turn < 0:
                    continue
                floor = work(text, plan, dtype, rows, E if spread == EVEN else 1)
                own[name].samples.append(milliseconds)
                own[name].shares.append(1e3 * floor.seconds(rates[-1].gemm, rates[-1].memory) / milliseconds)
        figures += own.values()
    return figures, rates


def _all_to(expert: int, rows: int, experts: int) -> Tensor:
    counts_E = torch.zeros(experts, dtype=torch.long)
    counts_E[expert] = rows
    return counts_E


@torch.inference_mode()
def _run(experts: nn.Module, x_ND: Tensor, counts_E: Tensor) -> None:
    experts(x_ND, counts_E)


def tables(figures: Sequence[Figure], rates: Sequence[Rates], about: str, markdown: bool) -> str:
    names = list(dict.fromkeys(figure.backend for figure in figures))
    blocks = [about]
    for spread in (EVEN, ONE):
        rows = []
        for per_expert in dict.fromkeys(figure.tokens_per_expert for figure in figures):
            own = {f.backend: f for f in figures if (f.spread, f.tokens_per_expert) == (spread, per_expert)}
            cells = (f"{Spread.of(own[n].samples)}, {Spread.of(own[n].shares).median:.0%}" for n in names)
            rows.append([str(per_expert), *cells])
        blocks.append(table([f"tokens per expert, {spread}; ms, share of the floor", *names], rows, markdown))
    memory, gemm = (Spread.of([getattr(r, kind) / 1e9 for r in rates]) for kind in ("memory", "gemm"))
    return "\n\n".join([*blocks, f"ceilings: memory read {memory} GB/s, product {gemm} GFLOP/s"])


def main(arguments: Sequence[str] | None = None) -> int:
    packed = [kind for kind in PACKED if kind in SCHEMES]
    backends = [*backends_for(torch.device("cpu"), torch.bfloat16), *packed]
    parser = argparse.ArgumentParser(prog="llama4 bench moe", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="whose sizes to take: scout, maverick, tiny, a directory or a Hub id")
    parser.add_argument("--hidden-size", type=positive, default=1024, metavar="D", help="without MODEL (default: 1024)")
    parser.add_argument("--width", type=positive, default=2048, metavar="F", help="of an expert (default: 2048)")
    parser.add_argument("--experts", type=positive, default=16, metavar="E", help="how many (default: 16)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, metavar="DTYPE", help="(default: bfloat16)")
    parser.add_argument("--backends", nargs="+", default=backends, choices=backends, metavar="NAME")
    parser.add_argument(
        "--tokens", nargs="+", type=positive, default=[1, 4, 16, 64, 256], metavar="N", help="per expert"
    )
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="(default: 5)")
    add_threads(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    text = TextConfig(
        hidden_size=options.hidden_size, intermediate_size=options.width, num_local_experts=options.experts
    )
    if options.model:
        text = read_config(options.model).text
        if not text.moe_layers:
            raise ValueError(
                f"{options.model} has no routed experts; take one that has, or --experts, --width and so on"
            )
    others = Others()
    figures, rates = measure(
        text, DTYPES[options.dtype], options.backends, options.tokens, options.rounds, options.threads
    )
    warn_of_others([others.share()])
    sizes = {"experts": text.num_local_experts, "hidden_size": text.hidden_size, "width": text.intermediate_size}
    machine = describe()
    if options.json:
        about = {"machine": machine, **sizes, "dtype": options.dtype, "ceilings": [asdict(rate) for rate in rates]}
        print(json.dumps(about | {"figures": [asdict(figure) for figure in figures]}, indent=2))
        return 0
    told = (
        f"{sizes['experts']} experts of {sizes['hidden_size']} x {sizes['width']} "
        f"({number(3 * text.hidden_size * text.intermediate_size / 1e6)} M numbers each), {options.dtype}; "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    )
    print(tables(figures, rates, told, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
