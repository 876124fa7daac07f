"""Speed and memory of several engines on the same tasks, each sample beside its roofline bound.

Every engine runs in a process of its own and does the same tasks with the same tokens. The engines take turns, in
several rounds. The machine's peak rates are measured just before and after each sample, because they drift on shared
machines: a sample during which the bound moved, or other processes were busy, is taken again. Samples are warm. Loading
is timed in fresh processes, with the files in the page cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from time import monotonic
from typing import Any

import torch

from llama4.bench import roofline
from llama4.bench.engine import EngineConfig
from llama4.bench.machine import OtherProcesses, describe
from llama4.bench.peak_rates import PeakProbe, PeakRates
from llama4.bench.peers import PEERS, Peer
from llama4.bench.report import DISTURBED, Spread, rates_json, shown, summary
from llama4.bench.tasks import Task, TimedEngine
from llama4.bench.workers import Worker
from llama4.config import Llama4Config
from llama4.model.device import DTYPES
from llama4.quantization.plan import QuantizationPlan

LOAD, FIRST, PEAK = "load, s", "load to first token, s", "peak memory, MiB"
UNSTEADY = 0.15
"""Fraction by which a roofline bound may move during a sample."""


@dataclass(frozen=True)
class TaskList:
    """Lengths of prompts, tokens to decode, whether there is a picture, the number of rounds, how often a disturbed
    sample is taken again, and the seconds after which no further sample of a figure is taken."""

    lengths: tuple[int, ...]
    new: int
    picture: bool
    rounds: int
    retries: int
    limit: float = math.inf

    def all(self) -> list[Task]:
        tasks = [Task("prefill", prompt=length) for length in self.lengths]
        tasks += [Task("decode", rows=rows, new=self.new) for rows in (1, 4, 16)]
        return [*tasks, Task("picture")] if self.picture else tasks


@dataclass
class Figure:
    """Samples of one engine at one task: seconds (or MiB), and where there is a roofline bound, its share of each."""

    task: str
    engine: str
    tokens: int = 0
    """Per sample; 0 for what is not counted in tokens."""
    samples: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """With the spread of tokens per second, or of the samples themselves."""
        unit = "tokens/s" if self.tokens else "MiB" if self.task == PEAK else "s"
        values = [self.tokens / sample for sample in self.samples] if self.tokens else self.samples
        content = {"task": self.task, "engine": self.engine, "unit": unit, **summary(values)}
        return content | ({"roofline_share": Spread.of(self.shares).median} if self.shares else {})


@dataclass(frozen=True)
class Sample:
    """A task done once: its seconds, its bound by the peak rates just before and just after, these, and the share of
    the cores that other processes used."""

    seconds: float
    bounds: tuple[float, float]
    rates: tuple[PeakRates, PeakRates]
    others: float | None

    @property
    def is_steady(self) -> bool:
        return max(self.bounds) <= (1 + UNSTEADY) * min(self.bounds) and (self.others or 0.0) < DISTURBED

    @property
    def roofline_share(self) -> float:
        """Of the bound that is the average of the two."""
        return sum(self.bounds) / 2 / self.seconds


def work_of(
    task: Task,
    config: Llama4Config,
    plan: QuantizationPlan,
    dtype: torch.dtype,
    experts: float,
    picture: tuple[int, int],
) -> roofline.Work:
    """The least work of a task; of decoding, of a step in the middle of the reply.

    `experts` is the number of different experts per layer that a decoding step reads, `picture` the tokens and tiles of
    the task with a picture.
    """
    text, vision = config.text, config.vision
    if task.kind == "prefill":
        return roofline.prefill(text, plan, dtype, task.prompt)
    if task.kind == "decode":
        return roofline.decode(text, plan, dtype, [task.prompt + task.new // 2] * task.rows, experts)
    tokens, tiles = picture
    assert vision is not None
    tower = roofline.vision(vision, tiles, text.hidden_size, dtype)
    return tower + roofline.prefill(text, plan, dtype, tokens)


def measure(
    config: Llama4Config, engines: Mapping[str, EngineConfig], plans: Mapping[str, QuantizationPlan], tasks: TaskList
) -> dict[str, Any]:
    """Every task by every engine, in turns; a report ready for JSON. The first engine is this library.

    Raises:
        Llama4Error: an engine cannot run this model.
    """
    vocabulary = min(config.text.vocab_size, config.boi_token_index)
    loads = _measure_loads({n: e for n, e in engines.items() if e.programs is None}, vocabulary, tasks.rounds)
    figures: dict[tuple[Task, str], Figure] = {}
    rates: dict[str, list[PeakRates]] = {}
    shares: list[float | None] = []
    with ExitStack() as stack:
        session = _Session(stack, config, engines, plans, tasks.all(), vocabulary)
        turns = [(turn, *pair) for turn in range(tasks.rounds) for pair in session.pairs]
        left = dict.fromkeys(session.pairs, tasks.limit)
        for turn, task, name in shown(turns, lambda turn: f"round {turn[0] + 1}, {turn[1]}, {turn[2]}"):
            if turn and left[task, name] <= 0:
                continue
            for _ in range(1 + tasks.retries):
                begin = monotonic()
                sample = session.sample(task, name)
                left[task, name] -= monotonic() - begin
                if sample.is_steady or left[task, name] <= 0:
                    break
            shares.append(sample.others)
            dtype_and_threads = f"{engines[name].dtype}, {thread_count(engines[name].threads)}"
            rates.setdefault(dtype_and_threads, []).extend(sample.rates)
            figure = figures.setdefault((task, name), Figure(str(task), name, task.tokens))
            figure.samples.append(sample.seconds)
            figure.shares.append(sample.roofline_share)
        peaks = [Figure(PEAK, name, samples=[w.call("peak_bytes") / 2**20]) for name, w in session.workers.items()]
    return {
        "machine": describe(),
        "distinct_experts": {str(task): count for task, count in session.experts.items()},
        "figures": [figure.to_json() for figure in (*loads, *peaks, *figures.values())],
        "peak_rates": {kind: rates_json(seen) for kind, seen in rates.items()},
        "share_of_other_processes": shares,
        "stolen": session.others.stolen(),
    }


def _measure_loads(engines: Mapping[str, EngineConfig], vocabulary: int, rounds: int) -> list[Figure]:
    loads = {name: (Figure(LOAD, name), Figure(FIRST, name)) for name in engines}
    for _, name in shown([*product(range(rounds), engines)], lambda turn: f"{turn[1]}: load"):
        with Worker(TimedEngine, engines[name], vocabulary) as worker:
            load, first = worker.call("load")
        loads[name][0].samples.append(load)
        loads[name][1].samples.append(load + first)
    return [loads[name][i] for i in (0, 1) for name in engines]


class _Session:
    """All engines, loaded and warm, each in its process until `stack` is closed."""

    def __init__(
        self,
        stack: ExitStack,
        config: Llama4Config,
        engines: Mapping[str, EngineConfig],
        plans: Mapping[str, QuantizationPlan],
        tasks: list[Task],
        vocabulary: int,
    ) -> None:
        self._config, self._engines, self._plans = config, engines, plans
        self.others = OtherProcesses()
        self.workers: dict[str, Worker | Peer] = {
            name: _start(stack, engine, vocabulary)
            for name, engine in shown([*engines.items()], lambda item: f"{item[0]}: load")
        }
        self.pairs = [
            (task, name)
            for task, (name, worker) in product(tasks, self.workers.items())
            if isinstance(worker, Worker) or worker.can(task)
        ]
        for task, name in shown(self.pairs, lambda pair: f"{pair[1]}: warm up, {pair[0]}"):
            if engines[name].programs is None:  # each of those warms up by itself
                self.workers[name].call("seconds", task)
        llama4 = next(iter(self.workers.values()))
        decoding = [task for task in tasks if task.kind == "decode"]
        self.experts = {
            task: llama4.call("distinct_experts", task) for task in shown(decoding, lambda task: f"experts of {task}")
        }
        has_picture = any(task.kind == "picture" for task in tasks)
        seen = {name for task, name in self.pairs if task.kind == "picture"} if has_picture else set()
        self._pictures = {n: w.call("picture_size") if n in seen else (0, 0) for n, w in self.workers.items()}
        kinds = dict.fromkeys((engine.dtype, engine.threads, engine.device) for engine in engines.values())
        self._probes = {kind: PeakProbe(DTYPES[kind[0]], *kind[1:]) for kind in kinds}

    def sample(self, task: Task, name: str) -> Sample:
        engine, worker = self._engines[name], self.workers[name]
        probe = self._probes[engine.dtype, engine.threads, engine.device]
        experts, picture = self.experts.get(task, 0.0), self._pictures[name]
        work = work_of(task, self._config, self._plans[name], DTYPES[engine.dtype], experts, picture)
        pids = [worker.pid for worker in self.workers.values() if worker.pid]
        self.others.share(pids)
        before = probe.measure()
        seconds = worker.call("seconds", task)
        after = probe.measure()
        bounds = work.seconds(before), work.seconds(after)
        return Sample(seconds, bounds, (before, after), self.others.share(pids))


def _start(stack: ExitStack, engine: EngineConfig, vocabulary: int) -> Worker | Peer:
    if engine.programs is not None:
        return stack.enter_context(PEERS[engine.engine].start(engine, vocabulary))
    return stack.enter_context(Worker(TimedEngine, engine, vocabulary))


def thread_count(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
