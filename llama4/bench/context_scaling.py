"""How time per token grows with the length of the context.

`llama4 bench growth PATH [--context 65536] [--every 4096] [--dtype DTYPE] [--json | --markdown]`
`llama4 bench growth PATH --filled [--context 1M] [--cache-dtype DTYPE]`

One sequence is prefilled in pieces, as `Llama4.chat` prefills long prompts, and every so many tokens a few are decoded.
With `--filled` nothing is prefilled: the cache gets random keys and values, and tokens are decoded after 1024, 2048,
4096, ... The times are then fitted to the work of attention (scaling_fit.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from llama4.api import Llama4
from llama4.arguments import Parser
from llama4.bench.long import text_vocabulary
from llama4.bench.machine import OtherProcesses, describe
from llama4.bench.peak_rates import PeakProbe, PeakRates, timed
from llama4.bench.report import (
    Spread,
    add_output_options,
    add_threads,
    number,
    positive,
    rates_json,
    rates_line,
    shown,
    table,
    warn_of_other_processes,
)
from llama4.bench.scaling_fit import Fit, Point, fit, keys_by_kind
from llama4.cache.batch import make_batch
from llama4.cache.formats import resolve_format
from llama4.cache.layer import READ_SLOTS
from llama4.cache.sequence import SequenceCache
from llama4.cache.view import CacheView
from llama4.config import TextConfig
from llama4.engine.prefill import PREFILL_TOKENS
from llama4.errors import Llama4Error
from llama4.model.device import DTYPES
from llama4.quantization.schemes import SCHEMES
from llama4.units import dtype_name, parse_tokens

STEPS = 16
"""Tokens that are decoded at a position."""


@dataclass
class Scaling:
    """Measured times, and what they are fitted to."""

    prefill: list[Point] = field(default_factory=list)
    decode: list[Point] = field(default_factory=list)
    rates: list[PeakRates] = field(default_factory=list)
    prefill_fit: Fit | None = None
    decode_fit: Fit | None = None

    def to_json(self) -> dict[str, Any]:
        content = asdict(self) | {"peak_rates": rates_json(self.rates)}
        del content["rates"]
        return content


@torch.inference_mode()
def measure(llm: Llama4, context: int, every: int, threads: int) -> Scaling:
    """Prefill a sequence of random tokens, and decode a few at every `every`."""
    model, text, ids = llm.model, llm.config.text, _random_ids(llm)
    probe, scaling = PeakProbe(model.dtype, threads, str(model.device)), Scaling()
    cache = model.new_cache(1, llm.cache_dtype)
    warm = model.new_cache()
    model(ids(min(context, PREFILL_TOKENS)), cache=warm, last_only=True)
    llm.runner.step(ids(1)[0], warm)
    del warm
    pieces = [
        (start, min(PREFILL_TOKENS, block + every - start, context - start))
        for block in range(0, context, every)
        for start in range(block, min(block + every, context), PREFILL_TOKENS)
    ]
    for start, tokens in shown(pieces, lambda piece: f"{piece[0]:,} tokens"):
        if start % every == 0 and cache.next_position[0]:
            scaling.rates.append(probe.measure())
            scaling.decode.append(_decode(llm, ids, cache))
        position, begin = cache.next_position[0], time.perf_counter()
        model(ids(tokens), cache=cache, last_only=True).argmax().item()
        scaling.prefill.append(Point(position, tokens, time.perf_counter() - begin))
    scaling.rates.append(probe.measure())
    scaling.decode.append(_decode(llm, ids, cache))
    scaling.decode_fit = _decode_fit(llm, scaling)
    per_key_flops = 4 * text.num_attention_heads * text.head_dim
    whole = [point for point in scaling.prefill if point.tokens == scaling.prefill[0].tokens]
    scaling.prefill_fit = fit(whole, lambda p: keys_by_kind(text, p.position, p.tokens), per_key_flops)
    return scaling


@torch.inference_mode()
def measure_filled(llm: Llama4, context: int, threads: int) -> Scaling:
    """Decode a few tokens after 1024 random keys and values, after twice as many, and so on."""
    probe, scaling = PeakProbe(llm.model.dtype, threads, str(llm.model.device)), Scaling()
    cache = llm.model.new_cache(1, llm.cache_dtype)
    lengths = [1024 << i for i in range(context.bit_length()) if 1024 << i <= context]
    if not lengths:
        raise Llama4Error(f"--context {context} is less than the 1024 tokens at which --filled begins")
    for length in shown(lengths, lambda length: f"{length:,} tokens"):
        fill(cache, length, llm.config.text, llm.model.dtype)
        scaling.rates.append(probe.measure())
        scaling.decode.append(_decode(llm, _random_ids(llm), cache))
    scaling.decode_fit = _decode_fit(llm, scaling)
    return scaling


def fill(cache: SequenceCache, length: int, text: TextConfig, dtype: torch.dtype) -> None:
    """Put random keys and values, the same in every layer, into the only row until it has `length` tokens."""
    while (past := cache.next_position[0]) < length:
        columns = min(READ_SLOTS, length - past)
        device = torch.device("cpu")
        batch = make_batch(1, columns, device, start=cache.start, next_position=cache.next_position)
        view, shape = CacheView(cache, batch), (columns, text.num_key_value_heads, text.head_dim)
        keys_NKC, values_NKC = (torch.randn(shape).to(dtype) for _ in range(2))
        for layer in view.layers:
            layer.write(keys_NKC, values_NKC)
        view.commit()


def _random_ids(llm: Llama4) -> Callable[[int], torch.Tensor]:
    vocabulary, generator = text_vocabulary(llm), torch.Generator().manual_seed(0)
    return lambda count: torch.randint(0, vocabulary, (1, count), generator=generator)


def _decode_fit(llm: Llama4, scaling: Scaling) -> Fit | None:
    text, format = llm.config.text, resolve_format(llm.cache_dtype, llm.model.dtype)
    per_key = 2 * text.num_key_value_heads * (format.bytes(text.head_dim) + (2 if format.scaled else 0))
    return fit(scaling.decode, lambda p: keys_by_kind(text, p.position + STEPS // 2, 1), per_key)


def _decode(llm: Llama4, ids: Callable[[int], torch.Tensor], cache: SequenceCache) -> Point:
    position = cache.next_position[0]
    llm.runner.step(ids(1)[0], cache)  # makes the block tables
    seconds = [timed(lambda: llm.runner.step(ids(1)[0], cache).argmax().item()) for _ in range(STEPS - 1)]
    return Point(position, 1, Spread.of(seconds).median)


def tables(report: Mapping[str, Any], markdown: bool = False) -> str:
    prefill, decode = report["prefill"], report["decode"]
    if not prefill:
        rows = [[f"{point['position']:,}", number(point["seconds"] * 1e3)] for point in decode]
        return "\n\n".join([table(("context", "decode, ms per token"), rows, markdown), _fits(report, markdown)])
    rows, spent = [], 0.0
    decode_at = {point["position"] + STEPS: point for point in decode}
    for point in prefill:
        start = point["position"]
        cell = number(decode_at[start]["seconds"] * 1e3) if start in decode_at else ""
        rows.append([f"{start:,}", cell, number(point["tokens"] / point["seconds"]), number(spent)])
        spent += point["seconds"]
    rows.append([f"{decode[-1]['position']:,}", number(decode[-1]["seconds"] * 1e3), "", number(spent)])
    heads = ("context", "decode, ms per token", "prefill of the next piece, tokens/s", "prefill so far, s")
    return "\n\n".join([table(heads, rows, markdown), _fits(report, markdown)])


def _fits(report: Mapping[str, Any], markdown: bool) -> str:
    piece = report["prefill"][0]["tokens"] if report["prefill"] else 0
    peak = {kind: report["peak_rates"][kind]["median"] for kind in ("memory", "gemm")}
    rows = []
    for name, found, unit, rate in (
        ("decode, ms per token", report["decode_fit"], "GB/s", peak["memory"]),
        (f"prefill of {piece:,} tokens, ms", report["prefill_fit"], "GFLOP/s", peak["gemm"]),
    ):
        if found is not None:
            shares = (
                f"{number(reached / 1e9)} {unit}, {reached / rate:.0%}" if reached else "-"
                for reached in (found["chunked_rate"], found["full_rate"])
            )
            rows.append([name, number(found["constant"] * 1e3), *shares, f"{found['largest_error']:.1%}"])
    heads = ("fitted", "constant", "chunked layers, share of the peak", "full layers", "largest error")
    return f"{table(heads, rows, markdown)}\n\n{rates_line(report['peak_rates'])}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="llama4 bench growth", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory, GGUF file or Hub id")
    parser.add_argument("--context", type=parse_tokens, default=65536, metavar="N", help="tokens (default: 65536)")
    parser.add_argument("--filled", action="store_true", help="fill the cache with random numbers, and only decode")
    parser.add_argument(
        "--every", type=positive, default=4096, metavar="N", help="decode after so many (default: 4096)"
    )
    parser.add_argument("--dtype", type=dtype_name, default="auto", choices=["auto", *DTYPES], metavar="DTYPE")
    parser.add_argument("--quantization", choices=[*SCHEMES], metavar="SCHEME", help="while loading")
    parser.add_argument("--cache-dtype", default="auto", metavar="DTYPE", help="fp8, int8, int4 (default: the model's)")
    add_threads(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    llm = Llama4.from_pretrained(
        options.model,
        device="cpu",
        dtype=options.dtype,
        quantization=options.quantization,
        cache_dtype=options.cache_dtype,
        progress=False,
    )
    positions = 0 if options.filled else options.context // options.every + 1
    needed = options.context + STEPS * positions
    if needed > (window := llm.config.text.max_position_embeddings):
        raise Llama4Error(
            f"--context {options.context} and what is decoded, {needed} tokens, are beyond the window, {window}"
        )
    others = OtherProcesses()
    if options.filled:
        scaling = measure_filled(llm, options.context, options.threads)
    else:
        scaling = measure(llm, options.context, options.every, options.threads)
    warn_of_other_processes([others.share()])
    report = {"machine": describe(), "model": options.model, **scaling.to_json()}
    print(json.dumps(report, indent=2) if options.json else tables(report, options.markdown))
    return 0
