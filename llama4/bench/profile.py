"""Where the time goes: prefill by parts of the model and torch operations, decoding by matrix products.

`llama4 bench profile PATH [--prompt 512] [--dtype DTYPE] [--quantization SCHEME] [--markdown]`

Prefill is watched by torch's profiler; what the project's own kernels take, and Python, is listed as such. A decoding
step runs in compiled code that no profiler sees into, so its matrix products are timed one by one, and the rest of the
whole step is listed as all else. Each part that multiplies stands beside the measured peak of products or memory.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llama4.api import Llama4
from llama4.arguments import Parser
from llama4.bench import roofline
from llama4.bench.machine import OtherProcesses, describe
from llama4.bench.model_parts import bytes_by_part, flops_by_part, plan_of
from llama4.bench.part_times import PartTimes, profile_parts, time_products
from llama4.bench.peak_rates import PeakProbe, PeakRates, median_seconds
from llama4.bench.report import (
    add_output_options,
    add_threads,
    number,
    positive,
    rates_json,
    table,
    warn_of_other_processes,
)
from llama4.model.device import DTYPES
from llama4.quantization.schemes import SCHEMES
from llama4.units import dtype_name

SMALL = 0.005
"""Share of the time below which an operation has no row of its own."""


@dataclass
class Row:
    """One operation of one part, over all layers of a run: its time, its calls, its share of the time, and in a part's
    first row, if the part multiplies, the part's share of the peak."""

    part: str
    operation: str
    milliseconds: float
    calls: float
    share_of_time: float
    share_of_peak: float | None = None


@dataclass
class Profile:
    """Of prefill or of a decoding step."""

    name: str
    rows: list[Row]
    milliseconds: float
    """Of a run without the profiler; the rows may sum up to a little more."""
    roofline_share: float


def make_rows(times: PartTimes, least_ms: Mapping[str, float]) -> list[Row]:
    """Largest part first, in each the largest operation first, the small ones summed up at the end.

    `least_ms` has the time of a part's work at the machine's peak rate.
    """
    total = sum(milliseconds for milliseconds, _ in times.values())
    parts: dict[str, list[Row]] = defaultdict(list)
    for (part, operation), (milliseconds, calls) in times.items():
        parts[part].append(Row(part, operation, milliseconds, calls, milliseconds / total))
    rows: list[Row] = []
    small = Row("all else", "", 0.0, 0.0, 0.0)
    for part, own in sorted(parts.items(), key=lambda item: -sum(row.milliseconds for row in item[1])):
        own.sort(key=lambda row: -row.milliseconds)
        spent = sum(row.milliseconds for row in own)
        own[0].share_of_peak = least_ms[part] / spent if part in least_ms and spent else None
        for row in own:
            if row.share_of_time >= SMALL:
                rows.append(row)
            else:
                small.milliseconds += row.milliseconds
                small.calls += row.calls
                small.share_of_time += row.share_of_time
    return [*rows, small] if small.calls else rows


def measure(llm: Llama4, prompt: int, threads: int, repeats: int) -> tuple[list[Profile], list[PeakRates]]:
    """Prefill of a prompt, and a step of one row after it."""
    model, text = llm.model, llm.config.text
    ids = torch.randint(0, min(text.vocab_size, llm.config.boi_token_index), (1, prompt))
    cache = model.new_cache()

    @torch.inference_mode()
    def prefill() -> None:
        nonlocal cache
        cache = model.new_cache()
        model(ids, cache=cache, last_only=True)

    @torch.inference_mode()
    def step() -> None:
        llm.runner.step(ids[:, 0], cache)

    probe, plan = PeakProbe(model.dtype, threads, str(model.device)), plan_of(model)
    rates = [probe.measure()]
    milliseconds = median_seconds(prefill, repeats) * 1e3
    times = profile_parts(model, prefill, repeats)
    rates.append(probe.measure())
    peak = PeakRates.mean(*rates[-2:])
    least_ms = {part: flops / peak.gemm * 1e3 for part, flops in flops_by_part(llm, prompt).items()}
    share = roofline.prefill(text, plan, model.dtype, prompt).seconds(peak) * 1e3 / milliseconds
    of_prefill = Profile(f"prefill of {prompt} tokens", make_rows(times, least_ms), milliseconds, share)

    prefill()
    milliseconds = median_seconds(step, 8 * repeats) * 1e3
    times = time_products(llm, 4 * repeats)
    rates.append(probe.measure())
    peak = PeakRates.mean(*rates[-2:])
    products_ms = sum(spent for spent, _ in times.values())
    times["all else: attention, norms, routing, Python", ""] = [max(milliseconds - products_ms, 0.0), 1.0]
    least_ms = {part: size / peak.memory * 1e3 for part, size in bytes_by_part(llm, prompt).items()}
    work = roofline.decode(text, plan, model.dtype, [prompt], text.num_experts_per_tok)
    share = work.seconds(peak) * 1e3 / milliseconds
    of_step = Profile(f"decode after {prompt} tokens", make_rows(times, least_ms), milliseconds, share)
    return [of_prefill, of_step], rates


def tables(report: Mapping[str, Any], markdown: bool = False) -> str:
    blocks = []
    for each in report["profiles"]:
        head = f"{each['name']}: {number(each['milliseconds'])} ms, {each['roofline_share']:.0%} of the roofline"
        lines, last = [], ""
        for row in each["rows"]:
            share = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] is not None else ""
            part, last = (row["part"] if row["part"] != last else ""), row["part"]
            figures = f"{row['milliseconds']:.2f}", f"{row['share_of_time']:.1%}", number(row["calls"]), share
            title = ": ".join(filter(None, (part, row["operation"]))) if part else f"  {row['operation']}"
            lines.append([title, *figures])
        heads = ("part: operation", "ms", "of the time", "calls", "of the peak")
        blocks.append(f"{head}\n\n{table(heads, lines, markdown)}")
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="llama4 bench profile", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory, GGUF file or Hub id")
    parser.add_argument("--dtype", type=dtype_name, default="auto", choices=["auto", *DTYPES], metavar="DTYPE")
    parser.add_argument("--quantization", choices=[*SCHEMES], metavar="SCHEME", help="while loading")
    parser.add_argument("--prompt", type=positive, default=512, metavar="N", help="tokens (default: 512)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="profiled runs (default: 5)")
    add_threads(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    llm = Llama4.from_pretrained(
        options.model, device="cpu", dtype=options.dtype, quantization=options.quantization, progress=False
    )
    others = OtherProcesses()
    profiles, rates = measure(llm, options.prompt, options.threads, options.rounds)
    warn_of_other_processes([others.share()])
    report = {
        "machine": describe(),
        "model": options.model,
        "prompt": options.prompt,
        "peak_rates": rates_json(rates),
        "profiles": [asdict(each) for each in profiles],
    }
    print(json.dumps(report, indent=2) if options.json else tables(report, options.markdown))
    return 0
