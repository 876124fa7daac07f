"""Speed and memory of a model, beside others on the same weights, and beside what the machine can do at most.

`llama4 bench generate PATH [--vs transformers] [--quantization none int8 int4] [--threads N] [--json | --markdown]`

Every contestant lives in a process of its own and does the same tasks with the same tokens. They take turns, in several
rounds, and just before and after each task of each the machine's own ceilings are measured, because machines drift: a
run during which the ceiling that counts has moved is done again. Figures are medians of runs that are warm; loading is
timed in fresh processes, with the files in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llama4.bench import roofline
from llama4.bench.engines import PEERS, Contestant, Setting, Task, version
from llama4.bench.machine import Ceilings, Others, Rates, describe
from llama4.bench.report import DISTURBED, Spread, add_output_options, number, positive, shown, table, warn_of_others
from llama4.bench.workers import Worker
from llama4.config import Llama4Config
from llama4.model.device import DTYPES, resolve_device, resolve_dtype
from llama4.quantization.schemes import SCHEMES, Plan
from llama4.weights import hub
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.meta_params import is_meta
from llama4.weights.quantizing import quantized

LOAD, FIRST, PEAK = "load, s", "load to first token, s", "peak memory, MiB"
UNSTEADY = 0.15
"""Part by which a floor may move during a run."""


@dataclass
class Figure:
    """Samples of one contestant at one task: seconds (or MiB), and where there is a floor, its share of each."""

    task: str
    contestant: str
    tokens: int = 0
    """That one sample reads or writes; 0 for what is not counted in tokens."""
    samples: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def spread(self) -> Spread:
        """Tokens per second, or the samples themselves."""
        return Spread.of([self.tokens / sample for sample in self.samples] if self.tokens else self.samples)

    def __str__(self) -> str:
        share = f", {Spread.of(self.shares).median:.0%}" if self.shares else ""
        return f"{self.spread()}{share}"


@dataclass(frozen=True)
class Tasks:
    """What is asked of all: lengths of prompts, tokens that are decoded, a picture or none, how often, and how often
    again where other processes disturbed or the machine changed."""

    lengths: tuple[int, ...]
    new: int
    picture: bool
    rounds: int
    patience: int

    def all(self) -> list[Task]:
        tasks = [Task("prefill", prompt=length) for length in self.lengths]
        tasks += [Task("decode", rows=rows, new=self.new) for rows in (1, 4)]
        return [*tasks, Task("picture")] if self.picture else tasks


@dataclass(frozen=True)
class Run:
    """A task done once: its seconds, its floor by the ceilings just before and just after, these, and the part of the
    cores that others took."""

    seconds: float
    floors: tuple[float, float]
    rates: tuple[Rates, Rates]
    others: float | None

    @property
    def is_steady(self) -> bool:
        return max(self.floors) <= (1 + UNSTEADY) * min(self.floors) and (self.others or 0.0) < DISTURBED

    @property
    def share(self) -> float:
        """Of the floor, that is on average of the two."""
        return sum(self.floors) / 2 / self.seconds


@dataclass
class Report:
    """All figures, in the order of the table, the ceilings of every task, and what they were measured on."""

    about: dict[str, Any]
    figures: list[Figure]
    rates: dict[str, list[Rates]]
    others: list[float | None]


class Floors:
    """The least that each task costs in a setting."""

    def __init__(self, config: Llama4Config, experts_met: Mapping[Task, float]) -> None:
        self._config, self._experts_met = config, experts_met

    def of(self, task: Task, plan: Plan, dtype: torch.dtype, picture: tuple[int, int]) -> roofline.Work:
        """`picture`: tokens and tiles of the task with a picture. Of decoding, a step on average over the reply."""
        text, vision = self._config.text, self._config.vision
        if task.kind == "prefill":
            return roofline.prefill(text, plan, dtype, task.prompt)
        if task.kind == "decode":
            middle = task.prompt + task.new // 2
            return roofline.decode(text, plan, dtype, [middle] * task.rows, self._experts_met[task])
        tokens, tiles = picture
        assert vision is not None
        tower = roofline.vision(vision, tiles, text.hidden_size, dtype)
        return tower + roofline.prefill(text, plan, dtype, tokens)


def measure(
    config: Llama4Config, contestants: Mapping[str, Setting], plans: Mapping[str, Plan], tasks: Tasks
) -> Report:
    """Every task by every contestant, in turns. The first contestant is this library.

    Raises:
        ValueError: a contestant cannot run this model.
    """
    vocabulary = min(config.text.vocab_size, config.boi_token_index)
    dtypes = {name: DTYPES[setting.dtype] for name, setting in contestants.items()}
    kinds = {name: (setting.dtype, setting.threads, setting.device) for name, setting in contestants.items()}
    others = Others()
    loads = {name: (Figure(LOAD, name), Figure(FIRST, name)) for name in contestants}
    for _, name in shown([*product(range(tasks.rounds), contestants)], lambda turn: f"{turn[1]}: load"):
        with Worker(Contestant, contestants[name], vocabulary) as worker:
            load, first = worker.call("load")
        loads[name][0].samples.append(load)
        loads[name][1].samples.append(load + first)

    figures: dict[tuple[Task, str], Figure] = {}
    rates: dict[str, list[Rates]] = {}
    disturbances: list[float | None] = []
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(Contestant, setting, vocabulary))
            for name, setting in shown([*contestants.items()], lambda item: f"{item[0]}: load")
        }
        pids = [worker.pid for worker in workers.values()]
        ours = next(iter(workers.values()))
        todo = tasks.all()
        for task, name in shown([*product(todo, workers)], lambda turn: f"{turn[1]}: warm up, {turn[0]}"):
            workers[name].call("seconds", task)
        experts = {task: ours.call("experts_met", task) for task in todo if task.kind == "decode"}
        pictures = {name: w.call("picture_size") if tasks.picture else (0, 0) for name, w in workers.items()}
        least = Floors(config, experts)
        ceilings = {kind: Ceilings(DTYPES[kind[0]], *kind[1:]) for kind in dict.fromkeys(kinds.values())}

        def run(task: Task, name: str) -> Run:
            ceiling, floor = ceilings[kinds[name]], least.of(task, plans[name], dtypes[name], pictures[name])
            others.share(pids)
            before = ceiling.measure()
            seconds = workers[name].call("seconds", task)
            around = before, ceiling.measure()
            first, second = (floor.seconds(rate.gemm, rate.memory) for rate in around)
            return Run(seconds, (first, second), around, others.share(pids))

        turns = [*product(range(tasks.rounds), todo, workers)]
        for _, task, name in shown(turns, lambda turn: f"round {turn[0] + 1}, {turn[1]}, {turn[2]}"):
            for _ in range(1 + tasks.patience):
                done = run(task, name)
                if done.is_steady:
                    break
            disturbances.append(done.others)
            kind, threads, _ = kinds[name]
            rates.setdefault(f"{kind}, {_threads(threads)}", []).extend(done.rates)
            tokens = {"prefill": task.prompt, "decode": task.rows}.get(task.kind, 0)
            figure = figures.setdefault((task, name), Figure(str(task), name, tokens))
            figure.samples.append(done.seconds)
            figure.shares.append(done.share)
        peaks = [Figure(PEAK, name, samples=[w.call("peak_bytes") / 2**20]) for name, w in workers.items()]
    about = {"machine": describe(), "experts_met": {str(task): met for task, met in experts.items()}}
    cold = [loads[name][i] for i in (0, 1) for name in contestants]
    return Report(about, [*cold, *peaks, *figures.values()], rates, disturbances)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def tables(report: Report, markdown: bool = False) -> str:
    """The figures, a column per contestant, and the ceilings below."""
    names = list(dict.fromkeys(figure.contestant for figure in report.figures))
    found = {(figure.task, figure.contestant): figure for figure in report.figures}
    rows = []
    for task in dict.fromkeys(figure.task for figure in report.figures):
        unit = ", tokens/s" if found[task, names[0]].tokens else ""
        unit = ", s" if task == str(Task("picture")) else unit
        rows.append([f"{task}{unit}", *(str(found[task, name]) for name in names)])
    machine = report.about["machine"]
    ceilings = [
        (kind, f"{Spread.of([r.memory / 1e9 for r in seen])}", f"{Spread.of([r.gemm / 1e9 for r in seen])}")
        for kind, seen in report.rates.items()
    ]
    head = (
        f"{report.about['model']}: {number(report.about['parameters'] / 1e6)} M parameters, of which a token is "
        f"multiplied with {number(report.about['active'] / 1e6)} M; {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}; median (lowest-highest) of {report.about['rounds']} rounds, share of the floor"
    )
    return "\n\n".join(
        [
            head,
            table(["", *names], rows, markdown),
            table(["ceilings", "memory read, GB/s", "product, GFLOP/s"], ceilings, markdown),
        ]
    )


def as_json(report: Report) -> dict[str, Any]:
    figures = [
        asdict(figure)
        | {"unit": "tokens/s" if figure.tokens else "MiB" if figure.task == PEAK else "s"}
        | asdict(figure.spread())
        | ({"share_of_floor": Spread.of(figure.shares).median} if figure.shares else {})
        for figure in report.figures
    ]
    rates = {kind: [asdict(rate) for rate in seen] for kind, seen in report.rates.items()}
    return {**report.about, "figures": figures, "ceilings": rates, "share_of_other_processes": report.others}


def contestants(
    directory: Path, config: Llama4Config, options: argparse.Namespace
) -> tuple[dict[str, Setting], dict[str, Plan]]:
    """Name in the report -> who it is, and in which formats its weights are. Settings of which there is one only are
    not named.

    Raises:
        ValueError: a setting that does not fit the model.
    """
    device = resolve_device(options.device)
    settings: dict[str, Setting] = {}
    plans: dict[str, Plan] = {}
    _, weights = open_checkpoint(directory)
    engines = ["llama4", *dict.fromkeys(options.vs)]
    for engine, dtype, threads, scheme in product(engines, options.dtype, options.threads, options.quantization):
        chosen = None if scheme == "none" or engine != "llama4" else scheme
        compute = str(resolve_dtype(dtype, config, device)).removeprefix("torch.")
        parts = [engine if engine == "llama4" else version(engine)]
        parts += [chosen or compute] if chosen or len(options.dtype) > 1 or len(options.quantization) > 1 else []
        parts += [_threads(threads)] if len(options.threads) > 1 else []
        name = ", ".join(parts)
        settings[name] = Setting(engine, str(directory), compute, threads, chosen, str(device), options.memory_map)
        plans[name] = quantized(weights, chosen).plan if chosen else weights.plan
    return settings, plans


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llama4 bench generate", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory or Hub id")
    parser.add_argument("--vs", action="append", default=[], choices=PEERS, help="another engine, beside; repeatable")
    parser.add_argument("--dtype", nargs="+", default=["auto"], choices=["auto", *DTYPES], metavar="DTYPE")
    parser.add_argument(
        "--quantization", nargs="+", default=["none"], choices=["none", *SCHEMES], metavar="SCHEME", help="of ours"
    )
    parser.add_argument("--threads", nargs="+", type=positive, default=[torch.get_num_threads()], metavar="N")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--no-memory-map",
        dest="memory_map",
        action="store_false",
        help="read weights into memory of their own",
    )
    parser.add_argument("--lengths", nargs="+", type=positive, default=[512, 2048], metavar="N", help="of prompts read")
    parser.add_argument("--reply", type=positive, default=64, metavar="N", help="tokens decoded (default: 64)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="runs of everything (default: 5)")
    parser.add_argument(
        "--patience", type=int, default=2, metavar="N", help="times to repeat what others disturb (default: 2)"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to a file, besides what is printed")
    add_output_options(parser)
    options = parser.parse_args(arguments)

    directory = hub.resolve(options.model)
    config, _ = open_checkpoint(directory)
    if options.vs and is_meta(directory):
        raise ValueError(
            f"{options.model} is in Meta's layout, which {options.vs[0]} does not read; measure what `llama4 convert "
            f"{options.model} DST --to hf` makes of it"
        )
    longest = max([*options.lengths, 128 + options.reply])
    if longest > config.text.max_position_embeddings:
        raise ValueError(f"{longest} tokens are beyond this model's window, {config.text.max_position_embeddings}")
    settings, plans = contestants(directory, config, options)
    has_picture = config.vision is not None and any(Path(directory).glob("tokenizer*"))
    tasks = Tasks(tuple(options.lengths), options.reply, has_picture, options.rounds, options.patience)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    report = measure(config, settings, plans, tasks)
    report.about |= {
        "model": options.model,
        "parameters": config.num_parameters(),
        "active": roofline.active_numbers(config.text),
        "rounds": options.rounds,
        "contestants": {name: asdict(setting) for name, setting in settings.items()},
    }
    content = json.dumps(as_json(report), indent=2)
    if options.save:
        options.save.write_text(content + "\n", encoding="utf-8")
    print(content if options.json else tables(report, options.markdown))
    warn_of_others(report.others)
    return 0


if __name__ == "__main__":
    sys.exit(main())
