"""A step of training an adapter, beside transformers with PEFT: tokens a second, memory, share of the machine's peak.

`llama4 bench finetune [small] [--layers 1] [--rows 4] [--length 512] [--rank 16] [--json | --markdown]`

LoRA on attention, routed and shared experts, with AdamW, in float32, of a text model with random weights. Each engine
has a process of its own; they take turns, and the machine's peak rates are measured before each step. The first step of
each is not counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from llama4.adapters.config import LoraConfig
from llama4.adapters.lora import Adapter
from llama4.analysis.finetuning import Training, flops_per_token
from llama4.arguments import Parser
from llama4.bench.machine import OtherProcesses, describe
from llama4.bench.make import MODELS
from llama4.bench.peak_rates import PeakProbe, PeakRates, timed
from llama4.bench.process_memory import peak_bytes, reset_peak, resident_bytes
from llama4.bench.report import (
    Spread,
    add_output_options,
    add_threads,
    machine_line,
    positive,
    rates_json,
    rates_line,
    summary,
    table,
    warn_of_other_processes,
)
from llama4.bench.training_task import RATE, TARGETS, Task
from llama4.bench.workers import Worker
from llama4.errors import Llama4Error
from llama4.model.multimodal import Llama4Model
from llama4.train.data import Batch
from llama4.train.loss import IGNORED
from llama4.train.optimizer import AdamW
from llama4.train.step import learn
from llama4.weights.memory import return_freed


class Ours:
    """This library, in a process of its own."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self._model = Llama4Model(task.config).requires_grad_(False)
        self._model.init_weights(torch.Generator().manual_seed(0))
        adapter = Adapter.create(self._model, LoraConfig(rank=task.rank, targets=TARGETS)).train()
        adapter.attach(self._model)
        self._optimizer = AdamW(dict(adapter.named_parameters()))
        ids = task.ids()
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
        self._batch = Batch(ids, torch.ones_like(ids), labels, None, ())

    def resident(self) -> int:
        """Bytes before a step."""
        reset_peak()
        return resident_bytes()

    def step(self) -> float:
        """Its seconds."""
        with return_freed():
            return timed(self._step)

    def _step(self) -> None:
        learn(self._model, self._batch)
        self._optimizer.step(RATE)

    def peak(self) -> int:
        """Bytes, since `resident`."""
        return peak_bytes()


def measure(task: Task, engines: Mapping[str, type], rounds: int) -> dict[str, Any]:
    """Figures of each engine, by its name."""
    training = Training("lora", LoraConfig(rank=task.rank, targets=TARGETS), task.tokens, task.length)
    flops = task.tokens * sum(flops_per_token(task.config.text, training, recomputed=False))
    probe, rates = PeakProbe(torch.float32, task.threads), list[PeakRates]()
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    shares: dict[str, list[float]] = {name: [] for name in engines}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(engine, task)) for name, engine in engines.items()}
        before = {name: worker.call("resident") for name, worker in workers.items()}
        for turn in range(-1, rounds):
            for name, worker in workers.items():
                rates.append(probe.measure())
                taken = worker.call("step")
                if turn >= 0:
                    seconds[name].append(taken)
                    shares[name].append(flops / taken / rates[-1].gemm)
        peaks = {name: worker.call("peak") for name, worker in workers.items()}
    figures = {
        name: {
            "seconds": summary(seconds[name]),
            "tokens_per_second": task.tokens / Spread.of(seconds[name]).median,
            "peak_share": Spread.of(shares[name]).median,
            "bytes_before": before[name],
            "peak_bytes": peaks[name],
        }
        for name in engines
    }
    return {"flops": flops, "peak_rates": rates_json(rates), "engines": figures}


def tables(report: Mapping[str, Any], markdown: bool = False) -> str:
    head = (
        f"LoRA of rank {report['rank']} on {', '.join(TARGETS)}, {report['layers']} layers of {report['model']}, "
        f"float32, {report['rows']} x {report['length']} tokens; {machine_line(report['machine'])}; "
        f"median (lowest-highest) of {report['rounds']} rounds\n{rates_line(report['peak_rates'])}"
    )
    rows = [
        [
            name,
            str(Spread.from_json(figures["seconds"])),
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['peak_share']:.0%}",
            f"{figures['peak_bytes'] / 2**30:.2f}",
            f"{figures['bytes_before'] / 2**30:.2f}",
        ]
        for name, figures in report["engines"].items()
    ]
    heads = ["", "a step, s", "tokens/s", "share of the peak product", "peak, GiB", "of them before, GiB"]
    return "\n\n".join([head, table(heads, rows, markdown)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="llama4 bench finetune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="?", default="small", choices=MODELS, help="whose shape to take (default: small)"
    )
    parser.add_argument("--layers", type=positive, default=1, metavar="N", help="of it (default: 1)")
    parser.add_argument("--rows", type=positive, default=4, metavar="B", help="examples in a batch (default: 4)")
    parser.add_argument("--length", type=positive, default=512, metavar="T", help="their tokens (default: 512)")
    parser.add_argument("--rank", type=positive, default=16, metavar="R", help="(default: 16)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--alone", action="store_true", help="without transformers and PEFT")
    add_threads(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = MODELS[options.model]()
    layers = min(options.layers, config.text.num_hidden_layers)
    kinds = {"moe_layers": None, "no_rope_layers": None, "layer_types": None}  # anew, for so many layers
    text = dataclasses.replace(config.text, num_hidden_layers=layers, **kinds)  # type: ignore[arg-type]
    task = Task(
        dataclasses.replace(config, text=text, vision=None), options.rows, options.length, options.rank, options.threads
    )
    engines: dict[str, type] = {"llama4": Ours}
    if not options.alone:
        if find_spec("peft") is None:
            raise Llama4Error("transformers and PEFT are not here: pip install peft transformers; or give --alone")
        from llama4.bench.peft_baseline import Theirs

        engines["transformers and PEFT"] = Theirs
    others = OtherProcesses()
    report = {"machine": describe(), "model": options.model, "layers": layers, "rounds": options.rounds}
    report |= {"rows": options.rows, "length": options.length, "rank": options.rank}
    report |= measure(task, engines, options.rounds)
    warn_of_other_processes([others.share()])
    print(json.dumps(report, indent=2) if options.json else tables(report, options.markdown))
    return 0
