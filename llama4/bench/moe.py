"""The experts' backends over tokens per expert, beside the machine's roofline.

`llama4 bench moe [MODEL] [--dtype bfloat16] [--tokens 1 4 16 64 256] [--json | --markdown]`

One layer's routed experts with random weights, of the sizes of MODEL or of those given. Tokens are spread evenly, or
all routed to one expert, another one in every run, so that its weights come from memory as they do in a model. The
backends take turns; figures are medians of warm runs.

Shapes: N tokens, D hidden size, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama4.analysis.costs import stored_bytes
from llama4.analysis.info import read_config
from llama4.arguments import Parser
from llama4.bench import roofline
from llama4.bench.machine import OtherProcesses, describe
from llama4.bench.peak_rates import PeakProbe, PeakRates, timed
from llama4.bench.report import (
    Spread,
    add_output_options,
    add_threads,
    machine_line,
    number,
    positive,
    rates_json,
    rates_line,
    shown,
    summary,
    table,
    warn_of_other_processes,
)
from llama4.config import TextConfig
from llama4.errors import Llama4Error
from llama4.model.device import DTYPES
from llama4.model.experts import BACKENDS, backends_for
from llama4.quantization.formats import FORMATS
from llama4.quantization.modules import QuantizedExperts
from llama4.quantization.plan import make_plan
from llama4.quantization.schemes import SCHEMES
from llama4.quantization.weight import QuantizedWeight, WeightFormat
from llama4.units import dtype_name

EVEN, ONE = "evenly", "all to one"


@dataclass
class Figure:
    """Milliseconds of one backend, and shares of the roofline, for so many tokens per expert on average."""

    backend: str
    routing: str
    tokens_per_expert: int
    samples: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        content = {"backend": self.backend, "routing": self.routing, "tokens_per_expert": self.tokens_per_expert}
        return content | summary(self.samples) | {"roofline_share": Spread.of(self.shares).median}


def make_backends(
    text: TextConfig, dtype: torch.dtype, names: Sequence[str]
) -> dict[str, tuple[nn.Module, dict[str, WeightFormat]]]:
    """Name -> experts with the same random weights, and the formats of the quantized ones.

    Raises:
        Llama4Error: a backend cannot run in this dtype, or a format does not fit these sizes.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in BACKENDS["loop"](text).named_parameters()}
    weights = {
        name: torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(dtype) for name, shape in shapes.items()
    }
    found: dict[str, tuple[nn.Module, dict[str, WeightFormat]]] = {}
    for name in names:
        if name in BACKENDS:
            if reason := BACKENDS[name].unsupported_reason(torch.device("cpu"), dtype):
                raise Llama4Error(f"the backend {name!r} cannot run here: {reason}")
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
        experts = QuantizedExperts()
        for part, weight in weights.items():
            setattr(experts, part, QuantizedWeight.of(weight.mT, plan[part]))
        found[name] = experts, plan
    return found


def work(text: TextConfig, plan: dict[str, WeightFormat], dtype: torch.dtype, rows: int, experts: int) -> roofline.Work:
    """The least work of `rows` rows that are routed to `experts` different experts."""
    E, D, F = text.num_local_experts, text.hidden_size, text.intermediate_size
    shapes = {"gate_up_proj": (E, D, 2 * F), "down_proj": (E, F, D)}
    read = sum(stored_bytes(shape, plan.get(part), dtype.itemsize) for part, shape in shapes.items())
    return roofline.Work(2 * rows * 3 * D * F, read * experts / E)


def measure(
    text: TextConfig, dtype: torch.dtype, names: Sequence[str], tokens: Sequence[int], rounds: int, threads: int
) -> tuple[list[Figure], list[PeakRates]]:
    """Every backend at every case, in turns."""
    backends = make_backends(text, dtype, names)
    E, generator = text.num_local_experts, torch.Generator().manual_seed(1)
    probe, rates, figures = PeakProbe(dtype, threads), list[PeakRates](), list[Figure]()
    cases = [(routing, per_expert) for routing in (EVEN, ONE) for per_expert in tokens]
    for routing, per_expert in shown(cases, lambda case: f"{case[1]} tokens per expert, {case[0]}"):
        rows = per_expert * E
        x_ND = torch.randn(rows, text.hidden_size, generator=generator).to(dtype)
        own = {name: Figure(name, routing, per_expert) for name in backends}
        for turn in range(-1, rounds):
            counts_E = torch.full((E,), per_expert) if routing == EVEN else _all_to(turn % E, rows, E)
            rates.append(probe.measure())
            for name, (experts, plan) in backends.items():
                milliseconds = 1e3 * timed(partial(_run, experts, x_ND, counts_E))
                if turn < 0:
                    continue
                least = work(text, plan, dtype, rows, E if routing == EVEN else 1)
                own[name].samples.append(milliseconds)
                own[name].shares.append(1e3 * least.seconds(rates[-1]) / milliseconds)
        figures += own.values()
    return figures, rates


def _all_to(expert: int, rows: int, experts: int) -> Tensor:
    counts_E = torch.zeros(experts, dtype=torch.long)
    counts_E[expert] = rows
    return counts_E


@torch.inference_mode()
def _run(experts: nn.Module, x_ND: Tensor, counts_E: Tensor) -> None:
    experts(x_ND, counts_E)


def tables(report: Mapping[str, Any], markdown: bool = False) -> str:
    figures, D, F = report["figures"], report["hidden_size"], report["width"]
    backends = list(dict.fromkeys(figure["backend"] for figure in figures))
    blocks = [
        f"{report['experts']} experts of {D} x {F} ({number(3 * D * F / 1e6)} M parameters each), {report['dtype']}; "
        f"{machine_line(report['machine'])}"
    ]
    for routing in (EVEN, ONE):
        rows = []
        for count in dict.fromkeys(figure["tokens_per_expert"] for figure in figures):
            own = {f["backend"]: f for f in figures if (f["routing"], f["tokens_per_expert"]) == (routing, count)}
            cells = (f"{Spread.from_json(own[name])}, {own[name]['roofline_share']:.0%}" for name in backends)
            rows.append([str(count), *cells])
        heads = [f"tokens per expert, {routing}; ms, share of the roofline", *backends]
        blocks.append(table(heads, rows, markdown))
    return "\n\n".join([*blocks, rates_line(report["peak_rates"])])


def main(arguments: Sequence[str] | None = None) -> int:
    packed = [kind for kind in FORMATS if kind in SCHEMES]
    backends = [*backends_for(torch.device("cpu"), torch.bfloat16), *packed]
    parser = Parser(prog="llama4 bench moe", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="whose sizes to take: scout, maverick, tiny, a directory or a Hub id")
    parser.add_argument("--hidden-size", type=positive, default=1024, metavar="D", help="without MODEL (default: 1024)")
    parser.add_argument("--width", type=positive, default=2048, metavar="F", help="of an expert (default: 2048)")
    parser.add_argument("--experts", type=positive, default=16, metavar="E", help="how many (default: 16)")
    parser.add_argument(
        "--dtype", type=dtype_name, default="bfloat16", choices=DTYPES, metavar="DTYPE", help="(default: bfloat16)"
    )
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
            raise Llama4Error(
                f"{options.model} has no routed experts; take one that has, or --experts, --width and so on"
            )
    others = OtherProcesses()
    figures, rates = measure(
        text, DTYPES[options.dtype], options.backends, options.tokens, options.rounds, options.threads
    )
    warn_of_other_processes([others.share()])
    report = {
        "machine": describe(),
        "experts": text.num_local_experts,
        "hidden_size": text.hidden_size,
        "width": text.intermediate_size,
        "dtype": options.dtype,
        "peak_rates": rates_json(rates),
        "figures": [figure.to_json() for figure in figures],
    }
    print(json.dumps(report, indent=2) if options.json else tables(report, options.markdown))
    return 0
