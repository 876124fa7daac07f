"""A server under load: tokens a second, many connections at once, many requests after each other.

`llama4 bench serve [MODEL] [--parts throughput connections endurance] [--vs URL ...] [--clients N ...]`

Throughput is of MODEL, which each of --quantization serves, and of servers that run already (--vs). Connections and
endurance are of the embedded model, and compare every reply with that of `llm.chat`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from llama4.api import Llama4
from llama4.arguments import Parser
from llama4.bench.machine import OtherProcesses, describe
from llama4.bench.report import (
    Spread,
    add_output_options,
    machine_line,
    number,
    positive,
    summary,
    table,
    warn_of_other_processes,
)
from llama4.bench.serving.client import Target
from llama4.bench.serving.crowd import Visitor, crowd, distinct, endurance, judge
from llama4.bench.serving.load import Prompts, StreamTimer, Workload, under_load
from llama4.bench.serving.process import Held, Served, allow_many_files
from llama4.bench.workers import Worker
from llama4.errors import ArgumentError, Llama4Error
from llama4.files import replace_text
from llama4.progress import Bar
from llama4.quantization.schemes import SCHEMES

PARTS = ("throughput", "connections", "endurance")
TINY = "tiny"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if "throughput" in options.parts and options.model is None:
        raise ArgumentError("throughput needs a MODEL; for the others alone: --parts connections endurance")
    report: dict[str, Any] = {"machine": describe(), "model": options.model}
    if "throughput" in options.parts:
        report["throughput"] = throughput(options)
    if "connections" in options.parts or "endurance" in options.parts:
        report |= functional(options)
    content = json.dumps(report, indent=2)
    if options.save:
        replace_text(options.save, content + "\n")
    print(content if options.json else tables(report, options.markdown))
    if "throughput" in report:
        warn_of_other_processes(report["throughput"]["share_of_other_processes"])
    return 0 if all(is_right(report[part]) for part in PARTS[1:] if part in report) else 1


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Every server in turns, at each number of clients, in several rounds."""
    shortest, longest = options.lengths
    workload = Workload(shortest, longest, options.shared, options.reply)
    if not workload.shortest <= workload.longest or not 0 <= workload.shared < workload.longest:
        raise ArgumentError("--lengths are the shortest and the longest, and --shared is from 0 to below the longest")
    if not options.seconds > 0:
        raise ArgumentError(f"--seconds is {options.seconds:g}; it must be above 0")
    with ExitStack() as stack:
        servers, pids = _servers(options, stack)
        first = Prompts(options.model, workload, -1).bodies(1)[0]
        servers = {name: _warmed(target, first) for name, target in servers.items()}
        figures, shares = _turns(options, workload, servers, pids)
        alone = [_against_stream(options, workload, scheme, servers) for scheme in options.quantization]
    return {
        "workload": vars(workload),
        "figures": [{"server": name, "clients": count, "rounds": seen} for (name, count), seen in figures.items()],
        "one_client_against_stream": alone,
        "share_of_other_processes": shares if not options.vs else [None],
    }


def _servers(options: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, Target], list[int]]:
    """All by name, ours started; and the processes of ours."""
    servers, pids = {}, []
    for scheme in options.quantization:
        extra = ["--quantization", scheme] if scheme != "none" else []
        served = stack.enter_context(Served(options.model, "--queue", "1000", *extra))
        servers[_name(scheme)] = served.target
        pids.append(served.pid)
    return servers | {url.partition("#")[0]: _target(url) for url in options.vs}, pids


def _name(scheme: str) -> str:
    return f"llama4, {scheme}" if scheme != "none" else "llama4"


def _turns(
    options: argparse.Namespace, workload: Workload, servers: Mapping[str, Target], pids: Sequence[int]
) -> tuple[dict[tuple[str, int], list[dict[str, Any]]], list[float | None]]:
    """The figures of each server with each number of clients, and how busy other processes were."""
    asked = [max(count * options.requests_per_client, options.least) for count in options.clients]
    figures: dict[tuple[str, int], list[dict[str, Any]]] = {}
    shares, others = [], OtherProcesses()
    others.share(pids)
    with Bar("asking", options.rounds * len(servers) * sum(asked), "steps") as bar:
        for turn, (level, clients) in product(range(options.rounds), enumerate(options.clients)):
            bodies = Prompts(options.model, workload, 100 * turn + level).bodies(asked[level])
            for name, target in servers.items():
                bar.describe(f"round {turn + 1}, {clients} clients, {name}")
                found = asyncio.run(under_load(target, bodies, clients, options.seconds, lambda: bar.advance(1)))
                figures.setdefault((name, clients), []).append(found)
                shares.append(others.share(pids))
    return figures, shares


def _warmed(target: Target, body: dict[str, Any]) -> Target:
    """A server that has answered once, without `ignore_eos` if it refuses that (transformers does): its replies may end
    before the others'."""
    try:
        asyncio.run(target.chat(body))
        return target
    except Llama4Error as error:
        if "ignore_eos" not in str(error):
            raise
    plain = replace(target, leaves_out=("ignore_eos",))
    asyncio.run(plain.chat(body))
    return plain


def _against_stream(
    options: argparse.Namespace, workload: Workload, scheme: str, servers: Mapping[str, Target]
) -> dict[str, Any]:
    """One client and `llm.stream`, turn by turn with the same prompts, none of which share a prefix."""
    name = _name(scheme)
    prompts = Prompts(options.model, workload, 10**6)
    bodies = [{**body, "messages": prompts.message(shares=False)} for body in prompts.bodies(options.pairs + 1)]
    direct: list[float] = []
    served: list[float] = []
    with (
        Worker(StreamTimer, options.model, None if scheme == "none" else scheme) as worker,
        Bar(f"{name} against llm.stream", 2 * len(bodies), "steps") as bar,
    ):
        for i, body in enumerate(bodies):
            tokens, seconds = worker.call("stream", body)
            bar.advance(1)
            body.pop("ignore_eos")
            answer = asyncio.run(servers[name].chat(body))
            bar.advance(1)
            if i and answer.tokens == tokens:  # the first warms both
                direct.append(tokens / seconds)
                served.append(tokens / (answer.last - answer.begun))
    if not direct:
        return {"server": name, "pairs": 0}
    ratios = [there / here for there, here in zip(served, direct, strict=True)]
    return {
        "server": name,
        "pairs": len(ratios),
        "stream": summary(direct),
        "served": summary(served),
        "ratio": summary(ratios),
    }


def _target(url: str) -> Target:
    """ "http://127.0.0.1:9000#name" -> a server and its model, the first that it tells if no name is given."""
    address, _, name = url.partition("#")
    target = Target(address, name)
    if name:
        return target
    models = json.loads(asyncio.run(target.get("/v1/models"))).get("data") or []
    if not models:
        raise ArgumentError(f"{address} tells no models; write {address}#NAME")
    return Target(address, models[0]["id"])


def functional(options: argparse.Namespace) -> dict[str, Any]:
    """Connections and endurance, at one server of the embedded model."""
    report: dict[str, Any] = {}
    allow_many_files(options.connections + 200)
    llm = Llama4.from_pretrained(TINY, progress=False)
    with Served(TINY, "--queue", str(max(options.connections, 64)), "--cache-memory", "256MiB") as served:
        if "connections" in options.parts:
            with Bar("connections", options.connections, "steps") as bar:
                seen, replies = asyncio.run(
                    crowd(served.target, served.pid, options.connections, lambda: bar.advance(1))
                )
            expected = _replies(llm, [Visitor.of(each) for each in replies])
            report["connections"] = judge(seen, replies, expected)
        if "endurance" in options.parts:
            expected = _replies(llm, distinct())
            with Bar("endurance", options.requests, "steps") as bar:
                report["endurance"] = asyncio.run(
                    endurance(served.target, served.pid, options.requests, 16, expected, lambda: bar.advance(1))
                )
    return report


def _replies(llm: Llama4, visitors: Sequence[Visitor]) -> dict[int, str]:
    with Bar("llm.chat", len(visitors), "steps") as bar:
        replies = {}
        for visitor in visitors:
            replies[visitor.number] = visitor.expected(llm)
            bar.advance(1)
    return replies


def is_right(part: Mapping[str, Any]) -> bool:
    """Whether every answer was right, and the server holds no more than before: no work, no file, no thread."""
    before, after = Held(**part["before"]), Held(**part["after"])
    return (
        not part.get("failures")
        and not part.get("mixed")
        and not part["wrong"]
        and part.get("stayed", part["right"]) == part["right"]
        and not any(part["still_to_do"].values())
        and (after.files or 0) <= (before.files or 0)
    )


def tables(report: Mapping[str, Any], markdown: bool = False) -> str:
    """What was measured, as lines of text."""
    shown = [f"{report['model'] or TINY}; {machine_line(report['machine'])}"]
    if "throughput" in report:
        shown += _throughput_tables(report["throughput"], markdown)
    if seen := report.get("connections"):
        shown.append(
            f"{seen['connections']:,} connections at once ({seen['slow']:,} slow, {seen['left']:,} leave) in "
            f"{number(seen['seconds'])} s: of {seen['stayed']:,} that stay {seen['right']:,} have the reply of "
            f"llm.chat, {seen['mixed']} another's, {seen['wrong']} a wrong one, {len(seen['failures'])} none; "
            f"{seen['distinct_replies']:,} different replies; {_held(seen)}"
        )
        shown += seen["failures"]
    if seen := report.get("endurance"):
        memory = [size / 2**20 for size in seen["memory"] if size is not None]
        shown.append(
            f"{seen['requests']:,} requests by {seen['clients']} clients in {number(seen['seconds'])} s: "
            f"{seen['right']:,} right, {seen['wrong']} wrong, {seen['left']:,} left; {_held(seen)}"
        )
        if memory:
            shown.append(
                f"memory of the server after each twentieth, MiB: {', '.join(f'{size:.0f}' for size in memory)}"
            )
    return "\n\n".join(shown)


def _throughput_tables(part: Mapping[str, Any], markdown: bool) -> list[str]:
    work = part["workload"]
    heads = ["server, clients", "tokens/s", "first token p50, ms", "p95, ms", "between tokens, ms", "answered"]
    rows = []
    for figure in part["figures"]:
        rounds = [each for each in figure["rounds"] if each["answered"]]
        name = f"{figure['server']}, {figure['clients']}"
        answered = f"{sum(each['answered'] for each in rounds)}/{sum(each['asked'] for each in figure['rounds'])}"
        keys = [("tokens_per_second", 1), ("first_token_p50", 1e3), ("first_token_p95", 1e3), ("between_tokens", 1e3)]
        seen = ([scale * each[key] for each in rounds if each[key] is not None] for key, scale in keys)
        cells = [str(Spread.of(values)) if values else "-" for values in seen]
        rows.append([name, *cells, answered])
    lines = [
        f"prompts of {work['shortest']} to {work['longest']} tokens, every other one beginning with the same "
        f"{work['shared']}; up to {work['new']} new",
        table(heads, rows, markdown),
    ]
    for alone in part["one_client_against_stream"]:
        if alone["pairs"]:
            ratio, stream = (Spread.from_json(alone[key]) for key in ("ratio", "stream"))
            lines.append(
                f"{alone['server']}: one client has {ratio} times the tokens a second of llm.stream, {stream}, prompt "
                f"included ({alone['pairs']} pairs)"
            )
    return lines


def _held(seen: Mapping[str, Any]) -> str:
    """What the server holds before and after."""
    before, after = seen["before"], seen["after"]
    return (
        f"open files {before['files']} -> {after['files']}, threads {before['threads']} -> {after['threads']}, memory "
        f"{(before['memory'] or 0) >> 20} -> {(after['memory'] or 0) >> 20} MiB"
    )


def _parser() -> Parser:
    parser = Parser(prog="llama4 bench serve", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="of throughput: embedded name, directory, GGUF file or Hub id"
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART", help=", ".join(PARTS))
    load = parser.add_argument_group("throughput")
    load.add_argument(
        "--vs",
        action="append",
        default=[],
        metavar="URL[#NAME]",
        help="a server in OpenAI's form that runs already, and its model's name; repeatable",
    )
    load.add_argument("--quantization", nargs="+", default=["none"], choices=["none", *SCHEMES], metavar="SCHEME")
    load.add_argument("--clients", nargs="+", type=positive, default=[1, 4, 16, 64], metavar="N")
    load.add_argument("--lengths", nargs=2, type=positive, default=[64, 512], metavar="N", help="of prompts, from, to")
    load.add_argument("--shared", type=int, default=256, metavar="N", help="tokens that every other prompt begins with")
    load.add_argument("--reply", type=positive, default=128, metavar="N", help="new tokens (default: 128)")
    load.add_argument("--requests-per-client", type=positive, default=2, metavar="N", help="default: 2")
    load.add_argument("--least", type=positive, default=8, metavar="N", help="requests of a figure (default: 8)")
    load.add_argument("--rounds", type=positive, default=1, metavar="N", help="of each figure (default: 1)")
    load.add_argument("--seconds", type=float, default=120, metavar="S", help="most of a figure (default: 120)")
    load.add_argument("--pairs", type=positive, default=8, metavar="N", help="prompts for llm.stream and one client")
    crowds = parser.add_argument_group("connections and endurance")
    crowds.add_argument("--connections", type=positive, default=1000, metavar="N", help="at once (default: 1000)")
    crowds.add_argument("--requests", type=positive, default=2000, metavar="N", help="after each other (default: 2000)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to a file, besides what is printed")
    add_output_options(parser)
    return parser
