"""Speed and memory of a model: loading, prompts, decoding, pictures.

`llama4 bench generate PATH [--vs transformers] [--vs llama.cpp=DIRECTORY] [--vs vllm=PYTHON] [--dtype DTYPE ...]
[--quantization SCHEME ...] [--threads N ...]`

How it measures stands in throughput.py.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llama4.arguments import Parser
from llama4.bench import roofline
from llama4.bench.engine import EngineConfig
from llama4.bench.engines import BASELINES, ENGINES, version
from llama4.bench.peers import PEERS
from llama4.bench.report import (
    Spread,
    add_output_options,
    number,
    positive,
    table,
    warn_of_other_processes,
    whole,
)
from llama4.bench.tasks import Task
from llama4.bench.throughput import PEAK, TaskList, measure, thread_count
from llama4.config import Llama4Config
from llama4.errors import Llama4Error
from llama4.files import replace_text
from llama4.model.device import DTYPES, resolve_device, resolve_dtype
from llama4.quantization.plan import QuantizationPlan
from llama4.quantization.schemes import SCHEMES
from llama4.units import dtype_name
from llama4.weights import hub
from llama4.weights.checkpoint import layout_of, open_checkpoint
from llama4.weights.directory import scratch_directory
from llama4.weights.quantizing import quantized


def tables(report: Mapping[str, Any], markdown: bool = False) -> str:
    """The figures, a column per engine, and the peak rates below."""
    figures, machine = report["figures"], report["machine"]
    engines = [figure["engine"] for figure in figures if figure["task"] == PEAK]  # loads are not of all
    found = {(figure["task"], figure["engine"]): figure for figure in figures}
    rows = []
    for task in dict.fromkeys(figure["task"] for figure in figures):
        unit = next(figure["unit"] for figure in figures if figure["task"] == task)
        named = task if task.endswith(f", {unit}") else f"{task}, {unit}"
        cells = (found.get((task, engine)) for engine in engines)
        rows.append([named, *(_cell(figure, report["rounds"]) if figure else "" for figure in cells)])
    rates = [
        (kind, *(str(Spread.from_json(seen[rate], 1e-9)) for rate in ("memory", "gemm")))
        for kind, seen in report["peak_rates"].items()
    ]
    kernels = f"kernels {machine['kernels']}, " if "kernels" in machine else ""  # older reports do not tell
    head = (
        f"{report['model']}: {number(report['parameters'] / 1e6)} M parameters, "
        f"{number(report['active'] / 1e6)} M active per token; {machine['cpu']}, {machine['cores']} cores, "
        f"{kernels}torch {machine['torch']}; "
        f"median (lowest-highest) of {report['rounds']} rounds, share of the roofline"
    )
    return "\n\n".join(
        [
            head,
            table(["", *engines], rows, markdown),
            table(["measured peak", "memory read, GB/s", "matrix product, GFLOP/s"], rates, markdown),
        ]
    )


def _cell(figure: Mapping[str, Any], rounds: int) -> str:
    share = f", {figure['roofline_share']:.0%}" if "roofline_share" in figure else ""
    count = len(figure.get("samples", range(rounds)))  # a stored report has the spread alone
    fewer = f", {count} of {rounds} rounds" if share and count < rounds else ""
    return f"{Spread.from_json(figure)}{share}{fewer}"


def engine_configs(
    directory: Path, config: Llama4Config, options: argparse.Namespace, scratch: Path
) -> tuple[dict[str, EngineConfig], dict[str, QuantizationPlan]]:
    """Name in the report -> the engine's configuration, and its weights' formats. A name leaves out what is the same
    for all. What a peer needs is written to `scratch`.

    Raises:
        Llama4Error: an option that does not fit the model.
    """
    device = resolve_device(options.device)
    configs: dict[str, EngineConfig] = {}
    plans: dict[str, QuantizationPlan] = {}
    _, weights = open_checkpoint(directory)
    engines = {"llama4": None, **dict(options.vs)}
    versions = {
        name: PEERS[name].version(programs) if programs else version(name) for name, programs in engines.items()
    }
    for (engine, programs), dtype, threads, scheme in product(
        engines.items(), options.dtype, options.threads, options.quantization
    ):
        chosen = None if scheme == "none" or (engine in ENGINES and engine != "llama4") else scheme
        compute = str(resolve_dtype(dtype, config, device)).removeprefix("torch.")
        parts = [engine if engine == "llama4" else versions[engine]]
        parts += [chosen or compute] if chosen or len(options.dtype) > 1 or len(options.quantization) > 1 else []
        parts += [thread_count(threads)] if len(options.threads) > 1 else []
        runs = directory
        if programs is not None:
            if (prepared := PEERS[engine].prepare(directory, compute, chosen, scratch)) is None:
                continue
            parts[1:2], runs = [prepared[0]], prepared[1]
        name = ", ".join(parts)
        configs[name] = EngineConfig(
            engine, str(runs), compute, threads, chosen, str(device), options.memory_map, programs
        )
        plans[name] = quantized(weights, chosen).plan if chosen else weights.plan
    return configs, plans


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a model, as `--json` prints them.

    Raises:
        Llama4Error: an option that does not fit the model.
    """
    directory = hub.resolve(options.model)
    config, _ = open_checkpoint(directory)
    if any(engine in BASELINES for engine, _ in options.vs) and layout_of(directory).name == "meta":
        raise Llama4Error(
            f"{options.model} is in Meta's layout, which {options.vs[0][0]} does not read; convert it first: "
            f"`llama4 convert {options.model} DST --to hf`"
        )
    longest = max([*options.lengths, Task("decode").prompt + options.reply])
    if longest > config.text.max_position_embeddings:
        raise Llama4Error(f"{longest} tokens are beyond this model's window, {config.text.max_position_embeddings}")
    has_picture = config.vision is not None and any(Path(directory).glob("tokenizer*"))
    tasks = TaskList(
        tuple(options.lengths), options.reply, has_picture, options.rounds, options.patience, options.limit
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with scratch_directory("bench") as scratch:
        engines, plans = engine_configs(directory, config, options, scratch)
        return {
            "model": options.model,
            "parameters": config.num_parameters(),
            "active": roofline.active_numbers(config.text),
            "rounds": options.rounds,
            "engines": {name: _without_paths(engine) for name, engine in engines.items()},
        } | measure(config, engines, plans, tasks)


def _without_paths(engine: EngineConfig) -> dict[str, Any]:
    """For a report: places in the file system are of one machine, and some of them are gone when it is read."""
    return {name: value for name, value in asdict(engine).items() if name not in ("directory", "programs")}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser("llama4 bench generate").parse_args(arguments)
    report = measured(options)
    content = json.dumps(report, indent=2)
    if options.save:
        replace_text(options.save, content + "\n")
    print(content if options.json else tables(report, options.markdown))
    warn_of_other_processes(report["share_of_other_processes"], report["stolen"])
    return 0


def _peer(text: str) -> tuple[str, str | None]:
    """Name of an engine, and where its programs are.

    Raises:
        ArgumentTypeError: another name, or no programs there.
    """
    for name, kind in PEERS.items():
        if (programs := kind.programs(text)) is not None:
            return name, programs
    if text not in BASELINES:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; choose {_USAGE}")
    return text, None


_USAGE = ", ".join([*BASELINES, *(kind.usage for kind in PEERS.values())])


def parser(prog: str, description: str = __doc__.splitlines()[0], **model: Any) -> Parser:
    """The options of `bench generate`, for a command of that name; `model` says more of its first argument."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("model", **{"metavar": "PATH", "help": "embedded name, directory, file or Hub id", **model})
    parser.add_argument(
        "--vs",
        action="append",
        default=[],
        type=_peer,
        metavar="ENGINE",
        help=f"a peer, repeatable: {_USAGE}",
    )
    parser.add_argument(
        "--dtype", type=dtype_name, nargs="+", default=["auto"], choices=["auto", *DTYPES], metavar="DTYPE"
    )
    parser.add_argument(
        "--quantization", nargs="+", default=["none"], choices=["none", *SCHEMES], metavar="SCHEME", help="of llama4"
    )
    parser.add_argument("--threads", nargs="+", type=positive, default=[torch.get_num_threads()], metavar="N")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--no-memory-map",
        dest="memory_map",
        action="store_false",
        help="read weights into memory of the process",
    )
    parser.add_argument("--lengths", nargs="+", type=positive, default=[512, 2048], metavar="N", help="of prompts")
    parser.add_argument("--reply", type=positive, default=64, metavar="N", help="tokens to decode (default: 64)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="samples of each task (default: 5)")
    parser.add_argument(
        "--patience", type=whole, default=2, metavar="N", help="times to repeat a disturbed sample (default: 2)"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="of a figure, after which no further samples of it are taken (default: 60)",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to a file, besides what is printed")
    add_output_options(parser)
    return parser
