"""Where the time goes: prefill by parts of the model and operations of torch inside, decoding by products.

`llama4 bench profile PATH [--prompt 512] [--dtype DTYPE] [--quantization SCHEME] [--markdown]`

In prefill hooks on the modules tell torch's profiler which part is at work. What our own kernels take shows as the
part's own time, and so does Python. A step of decoding goes through all layers in compiled code that no profiler looks
into; so its products are timed one by one, all layers in order, which brings every matrix from memory as in a step.
What a call from Python costs is taken off, and what is left of the whole step is all else.

A part that multiplies stands beside the machine's ceiling: that of a large product, or of reading memory.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from llama4.analysis.costs import HEAD, stored_bytes
from llama4.api import Llama4
from llama4.bench import roofline
from llama4.bench.machine import Ceilings, Others, Rates, describe, seconds, timed
from llama4.bench.report import add_output_options, add_threads, number, positive, table, warn_of_others
from llama4.kernels import build, cpu
from llama4.model.device import DTYPES
from llama4.model.moe import Router
from llama4.ops.linear import project
from llama4.quantization.modules import PackedExperts
from llama4.quantization.schemes import SCHEMES
from llama4.quantization.weight import PackedWeight

MARK = "part: "
SMALL = 0.005
"""Share of the time below which an operation is not listed by itself."""


@dataclass
class Row:
    """One operation of one part, over all layers: milliseconds of a run, how often it is called in it, and of a part's
    first row, where the part multiplies, the share of the ceiling."""

    part: str
    operation: str
    milliseconds: float
    calls: float
    share_of_time: float
    share_of_ceiling: float | None = None


@dataclass
class Profile:
    """Of prefill or of one step of decoding."""

    name: str
    rows: list[Row]
    milliseconds: float
    """Of a run that nothing watches; the rows may sum up to a little more."""
    share_of_floor: float


def part_of(name: str) -> str:
    """A module's name without its layer's number: "self_attn.q_proj", "feed_forward.experts", "layer"."""
    name = re.sub(r"^language_model(\.model)?\.?", "", name)
    name = re.sub(r"^layers\.\d+\.?", "layer.", name).rstrip(".")
    return name.removeprefix("layer.") or "model"


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Within, the profiler sees which module is at work; what is inside a packed matrix is not looked into."""
    open_marks: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            mark = record_function(MARK + part_of(name))
            mark.__enter__()
            open_marks.append(mark)

        return hook

    def leave(*_: object) -> None:
        open_marks.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            inside_experts = name.rpartition(".")[0].endswith(".experts")
            if isinstance(module, (nn.ModuleList, nn.Embedding)) or inside_experts or name.startswith("vision"):
                continue
            hooks.enter_context(module.register_forward_pre_hook(enter(name)))
            hooks.enter_context(module.register_forward_hook(leave))
        yield


def watch(model: nn.Module, run: Callable[[], object], repeats: int) -> dict[tuple[str, str], list[float]]:
    """(part, operation) -> milliseconds and calls of one run."""
    with marked(model):
        run()
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            for _ in range(repeats):
                run()
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in watched.events():
        if not event.self_cpu_time_total:
            continue
        holder = event
        while holder is not None and not holder.name.startswith(MARK):
            holder = holder.cpu_parent
        if holder is None:
            continue
        part = holder.name.removeprefix(MARK)
        operation = "own kernels, Python" if event is holder else event.name.removeprefix("aten::")
        entry = found[part, operation]
        entry[0] += event.self_cpu_time_total / 1000 / repeats
        entry[1] += 1 / repeats
    return dict(found)


def flops_by_part(llm: Llama4, tokens: int) -> dict[str, float]:
    """Of a prompt."""
    text, found = llm.config.text, defaultdict[str, float](float)
    for name, shape in roofline.matrices(text).items():
        part = part_of(name.removesuffix(".weight"))
        if len(shape) == 3:
            found[part.rpartition(".")[0]] += 2 * tokens * text.num_experts_per_tok * shape[1] * shape[2]
        else:
            found[part] += 2 * (1 if name == HEAD else tokens) * shape[0] * shape[1]
    found["self_attn"] = roofline.attention_flops(text, range(tokens))
    return found


def bytes_by_part(llm: Llama4, position: int) -> dict[str, float]:
    """Of a step of one row."""
    text, dtype, found = llm.config.text, llm.model.dtype, defaultdict[str, float](float)
    plan = plan_of(llm.model)
    for name, shape in roofline.matrices(text).items():
        part, size = part_of(name.removesuffix(".weight")), stored_bytes(shape, plan.get(name), dtype.itemsize)
        if len(shape) == 3:
            found[part.rpartition(".")[0]] += size * text.num_experts_per_tok / shape[0]
        else:
            found[part] += size
    keys = sum(roofline.keys_seen(text, layer, [position]) for layer in range(text.num_hidden_layers))
    found["self_attn"] = 2 * text.num_key_value_heads * text.head_dim * dtype.itemsize * keys
    return found


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Parameter of the unquantised model -> its format, where it is packed."""
    owners = {name for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    return {
        name if name.rpartition(".")[0] in owners else f"{name}.weight": module.format
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
    }


def rows_of(found: dict[tuple[str, str], list[float]], least_ms: dict[str, float]) -> list[Row]:
    """Largest part first, in each the largest operation first, all small ones summed up at the end; a part's share of
    the ceiling stands with the first of its operations and is that of all of them."""
    total = sum(milliseconds for milliseconds, _ in found.values())
    parts: dict[str, list[Row]] = defaultdict(list)
    for (part, operation), (milliseconds, calls) in found.items():
        parts[part].append(Row(part, operation, milliseconds, calls, milliseconds / total))
    rows: list[Row] = []
    small = Row("all else", "", 0.0, 0.0, 0.0)
    for part, own in sorted(parts.items(), key=lambda item: -sum(row.milliseconds for row in item[1])):
        own.sort(key=lambda row: -row.milliseconds)
        spent = sum(row.milliseconds for row in own)
        own[0].share_of_ceiling = least_ms[part] / spent if part in least_ms and spent else None
        for row in own:
            if row.share_of_time >= SMALL:
                rows.append(row)
            else:
                small.milliseconds += row.milliseconds
                small.calls += row.calls
                small.share_of_time += row.share_of_time
    return [*rows, small] if small.calls else rows


def products(llm: Llama4) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a step of one row multiplies with, in order: the part, and a call that does it; of experts the first."""
    rows: dict[int, Tensor] = {}

    def row(width: int) -> Tensor:
        if width not in rows:
            rows[width] = torch.randn(1, width).to(llm.model.device, llm.model.dtype)
        return rows[width]

    def through(linear: nn.Module, width: int) -> Callable[[], object]:
        if isinstance(linear, Router):  # whose own forward widens its weights for many rows; a step does not
            return partial(_product, row(width), linear.weight)
        return lambda: linear(row(width))

    for name, shape in roofline.matrices(llm.config.text).items():
        path, part = name.removesuffix(".weight"), part_of(name.removesuffix(".weight"))
        if len(shape) == 2:
            yield part, through(llm.model.get_submodule(path), shape[1])
            continue
        owner, _, leaf = path.rpartition(".")
        weight: Any = getattr(llm.model.get_submodule(owner), leaf)
        for expert in range(llm.config.text.num_experts_per_tok):
            call = partial(weight.product, row(shape[1]), expert) if isinstance(weight, PackedWeight) else None
            yield part.rpartition(".")[0], call or partial(project, row(shape[1]), weight[expert])


@torch.inference_mode()
def time_products(llm: Llama4, repeats: int) -> dict[tuple[str, str], list[float]]:
    """(part, "") -> milliseconds and calls of one step; medians, less what a call from Python costs."""
    todo = list(products(llm))
    cost = _cost_of_a_call(llm)
    samples: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, float] = defaultdict(float)
    for turn in range(repeats + 1):
        spent: dict[str, float] = defaultdict(float)
        for part, call in todo:
            spent[part] += max(timed(call) - cost, 0.0)
            calls[part] += turn == 0
        for part, seconds_ in spent.items():
            samples[part] += [seconds_ * 1e3] if turn else []
    return {(part, ""): [statistics.median(spent), calls[part]] for part, spent in samples.items()}


def _cost_of_a_call(llm: Llama4) -> float:
    """Seconds of a product with next to nothing."""
    weight = torch.randn(16, 512).to(llm.model.device, llm.model.dtype)
    x = weight[:1].clone()
    return min(timed(lambda: _product(x, weight)) for _ in range(200))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """By a kernel, however small the matrix is, if there is one."""
    has_kernel = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and build.library() is not None
    return cpu.linear(x, weight) if has_kernel else torch.nn.functional.linear(x, weight)


def measure(llm: Llama4, prompt: int, threads: int, repeats: int) -> tuple[list[Profile], list[Rates]]:
    """Prefill of a prompt, and a step of one row after it."""
    model, text = llm.model, llm.config.text
    ids = torch.randint(0, min(text.vocab_size, llm.config.boi_token_index), (1, prompt))
    memory = model.new_cache()

    @torch.inference_mode()
    def prefill() -> None:
        nonlocal memory
        memory = model.new_cache()
        model(ids, cache=memory, last_only=True)

    @torch.inference_mode()
    def step() -> None:
        model(ids[:, :1], cache=memory, last_only=True)

    ceilings, plan = Ceilings(model.dtype, threads, str(model.device)), plan_of(model)
    rates = [ceilings.measure()]
    bare = seconds(prefill, repeats) * 1e3
    found = watch(model, prefill, repeats)
    rates.append(ceilings.measure())
    most = _mean(*rates[-2:])
    least = {part: flops / most.gemm * 1e3 for part, flops in flops_by_part(llm, prompt).items()}
    share = roofline.prefill(text, plan, model.dtype, prompt).seconds(most.gemm, most.memory) * 1e3 / bare
    reading = Profile(f"prefill of {prompt} tokens", rows_of(found, least), bare, share)

    prefill()
    bare = seconds(step, 8 * repeats) * 1e3
    found = time_products(llm, 4 * repeats)
    rates.append(ceilings.measure())
    most = _mean(*rates[-2:])
    products_ms = sum(milliseconds for milliseconds, _ in found.values())
    found["all else: attention, norms, routing, Python", ""] = [max(bare - products_ms, 0.0), 1.0]
    least = {part: size / most.memory * 1e3 for part, size in bytes_by_part(llm, prompt).items()}
    share = roofline.decode(text, plan, model.dtype, [prompt], text.num_experts_per_tok).seconds(most.gemm, most.memory)
    decoding = Profile(f"decode after {prompt} tokens", rows_of(found, least), bare, share * 1e3 / bare)
    return [reading, decoding], rates


def _mean(before: Rates, after: Rates) -> Rates:
    return Rates((before.memory + after.memory) / 2, (before.gemm + after.gemm) / 2)


def tables(profiles: Sequence[Profile], markdown: bool) -> str:
    blocks = []
    for each in profiles:
        head = f"{each.name}: {number(each.milliseconds)} ms, {each.share_of_floor:.0%} of the floor"
        lines, last = [], ""
        for row in each.rows:
            ceiling = f"{row.share_of_ceiling:.0%}" if row.share_of_ceiling is not None else ""
            part, last = (row.part if row.part != last else ""), row.part
            figures = f"{row.milliseconds:.2f}", f"{row.share_of_time:.1%}", number(row.calls), ceiling
            title = ": ".join(filter(None, (part, row.operation))) if part else f"  {row.operation}"
            lines.append([title, *figures])
        heads = ("part: operation", "ms", "of the time", "calls", "of the ceiling")
        blocks.append(f"{head}\n\n{table(heads, lines, markdown)}")
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llama4 bench profile", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory or Hub id")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], metavar="DTYPE")
    parser.add_argument("--quantization", choices=[*SCHEMES], metavar="SCHEME", help="while loading")
    parser.add_argument("--prompt", type=positive, default=512, metavar="N", help="tokens (default: 512)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="runs that are watched (default: 5)")
    add_threads(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    llm = Llama4.from_pretrained(
        options.model, device="cpu", dtype=options.dtype, quantization=options.quantization, progress=False
    )
    others = Others()
    profiles, rates = measure(llm, options.prompt, options.threads, options.rounds)
    warn_of_others([others.share()])
    if options.json:
        about = {"machine": describe(), "model": options.model, "prompt": options.prompt}
        about["ceilings"] = [asdict(rate) for rate in rates]
        print(json.dumps(about | {"profiles": [asdict(each) for each in profiles]}, indent=2))
    else:
        print(tables(profiles, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
