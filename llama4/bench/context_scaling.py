"""How time per token grows with the length of what came before.

`llama4 bench growth PATH [--context 65536] [--every 4096] [--dtype DTYPE] [--json | --markdown]`
`llama4 bench growth PATH --filled [--context 1M] [--cache-dtype DTYPE]`

One sequence is read in pieces, as `Llama4.chat` reads long prompts, and every so many tokens a few are decoded. With
`--filled` nothing is read: the cache gets random keys and values, and tokens are decoded behind 1024, 2048, 4096, ...
The times are then fitted by least squares as a constant, plus what chunked layers cost, plus what the layers that see
everything cost, each at a rate of its own: a step of decoding reads keys and values, a piece of a prompt multiplies
with them. In the fit chunked layers can only grow within a chunk: its largest error says whether they stay flat beyond.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from llama4.api import Llama4
from llama4.bench import roofline
from llama4.bench.long import plain_words
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
from llama4.cache.formats import resolve_format
from llama4.cache.sequence import SPAN, Cache
from llama4.config import TextConfig
from llama4.engine.generate import PREFILL_TOKENS, step
from llama4.model.device import DTYPES
from llama4.model.multimodal import Llama4Model
from llama4.quantization.schemes import SCHEMES
from llama4.units import parse_tokens

STEPS = 16
"""Tokens that are decoded at a place."""


@dataclass
class Point:
    """At a place of the sequence: the seconds of reading the piece that begins there, or of one step (the median)."""

    position: int
    tokens: int
    seconds: float


@dataclass
class Fit:
    """seconds = constant + chunked work / its rate + full work / its rate; rates in bytes or operations per second, the
    same one where the points do not tell the two kinds apart, None where time does not grow with work."""

    constant: float
    chunked_rate: float | None
    full_rate: float | None
    largest_error: float
    """Of the points, as a share of the point."""


@dataclass
class Growth:
    """What was measured, and what it fits to."""

    prefill: list[Point] = field(default_factory=list)
    decode: list[Point] = field(default_factory=list)
    rates: list[Rates] = field(default_factory=list)
    prefill_fit: Fit | None = None
    decode_fit: Fit | None = None


def keys_by_kind(text: TextConfig, position: int, tokens: int) -> tuple[int, int]:
    """Keys that these tokens see in all chunked layers, and in all layers that see everything."""
    kinds = [0, 0]
    for layer in range(text.num_hidden_layers):
        kinds[text.window(layer) is None] += roofline.keys_seen(text, layer, range(position, position + tokens))
    return kinds[0], kinds[1]


def fit(points: Sequence[Point], keys: Callable[[Point], tuple[int, int]], per_key: int) -> Fit | None:
    """By least squares; None with fewer points than unknowns.

    `keys` gives the keys in chunked layers and in full ones, `per_key` the bytes or operations of one.
    """
    work = torch.tensor([keys(point) for point in points], dtype=torch.float64).reshape(-1, 2) * per_key
    spent = torch.tensor([point.seconds for point in points], dtype=torch.float64)
    told_apart = len(points) > 0 and _differ(work)
    work = work if told_apart else work.sum(1, keepdim=True)
    if len(points) < work.shape[1] + 2:
        return None
    scale = work.amax(0).clamp(min=1)
    unknowns = torch.cat([torch.ones(len(points), 1, dtype=torch.float64), work / scale], dim=1)
    weights = 1 / spent  # a share of each point counts, not the seconds
    solution = torch.linalg.lstsq(unknowns * weights[:, None], (spent * weights)[:, None]).solution[:, 0]
    errors = (unknowns @ solution - spent).abs() / spent
    slopes = (solution[1:] / scale).tolist()
    chunked, full = (1 / slope if slope > 0 else None for slope in (slopes[0], slopes[-1]))
    return Fit(solution[0].item(), chunked, full, errors.max().item())


def _differ(work: torch.Tensor) -> bool:
    """Whether there are layers of both kinds, and what they saw differed from point to point and between the two."""
    shares = work / work.amax(0).clamp(min=1)
    both = torch.cat([shares, shares[:, :1] - shares[:, 1:]], dim=1)
    return bool(work.any(0).all()) and bool((both.amax(0) - both.amin(0)).min() > 0.2)


@torch.inference_mode()
def measure(llm: Llama4, context: int, every: int, threads: int) -> Growth:
    """Read a sequence of random tokens, and decode a few at every `every`."""
    model, text, ids = llm.model, llm.config.text, _random_ids(llm)
    ceilings, growth = Ceilings(model.dtype, threads, str(model.device)), Growth()
    cache = model.new_cache(1, llm.cache_dtype)
    warm = model.new_cache()
    model(ids(min(context, PREFILL_TOKENS)), cache=warm, last_only=True)
    step(model, ids(1)[0], warm)
    del warm
    pieces = [
        (start, min(PREFILL_TOKENS, block + every - start, context - start))
        for block in range(0, context, every)
        for start in range(block, min(block + every, context), PREFILL_TOKENS)
    ]
    for start, tokens in shown(pieces, lambda piece: f"{piece[0]:,} tokens"):
        if start % every == 0 and cache.nexts[0]:
            growth.rates.append(ceilings.measure())
            growth.decode.append(_decoded(model, ids, cache))
        at, begin = cache.nexts[0], time.perf_counter()
        model(ids(tokens), cache=cache, last_only=True).argmax().item()
        growth.prefill.append(Point(at, tokens, time.perf_counter() - begin))
    growth.rates.append(ceilings.measure())
    growth.decode.append(_decoded(model, ids, cache))
    growth.decode_fit = _decode_fit(llm, growth)
    per_key_flops = 4 * text.num_attention_heads * text.head_dim
    whole = [point for point in growth.prefill if point.tokens == growth.prefill[0].tokens]
    growth.prefill_fit = fit(whole, lambda p: keys_by_kind(text, p.position, p.tokens), per_key_flops)
    return growth


@torch.inference_mode()
def measure_filled(llm: Llama4, context: int, threads: int) -> Growth:
    """Decode a few tokens behind 1024 random keys and values, behind twice as many, and so on."""
    ceilings, growth = Ceilings(llm.model.dtype, threads, str(llm.model.device)), Growth()
    cache = llm.model.new_cache(1, llm.cache_dtype)
    places = [1024 << i for i in range(context.bit_length()) if 1024 << i <= context]
    if not places:
        raise ValueError(f"--context {context} is less than the 1024 tokens at which --filled begins")
    for place in shown(places, lambda place: f"{place:,} tokens"):
        fill(cache, place, llm.config.text, llm.model.dtype)
        growth.rates.append(ceilings.measure())
        growth.decode.append(_decoded(llm.model, _random_ids(llm), cache))
    growth.decode_fit = _decode_fit(llm, growth)
    return growth


def fill(cache: Cache, length: int, text: TextConfig, dtype: torch.dtype) -> None:
    """Put random keys and values into the only row until it is so long, in every layer those that it would hold."""
    for layer, window in zip(cache.layers, cache.windows, strict=True):
        held, past = cache.held(0, length, window), 0 if window else cache.held(0, cache.nexts[0], None)
        for start in range(past, held, SPAN):
            shape = (min(SPAN, held - start), text.num_key_value_heads, text.head_dim)
            layer.keep(0, start, *(torch.randn(shape, device=layer.device).to(dtype) for _ in range(2)))
    cache.nexts = (length,)


def _random_ids(llm: Llama4) -> Callable[[int], torch.Tensor]:
    words, generator = plain_words(llm), torch.Generator().manual_seed(0)
    return lambda count: torch.randint(0, words, (1, count), generator=generator)


def _decode_fit(llm: Llama4, growth: Growth) -> Fit | None:
    text, format = llm.config.text, resolve_format(llm.cache_dtype, llm.model.dtype)
    per_key = 2 * text.num_key_value_heads * (format.bytes(text.head_dim) + (2 if format.scaled else 0))
    return fit(growth.decode, lambda p: keys_by_kind(text, p.position + STEPS // 2, 1), per_key)


def _decoded(model: Llama4Model, ids: Callable[[int], torch.Tensor], cache: Cache) -> Point:
    position = cache.nexts[0]
    step(model, ids(1)[0], cache)  # tables of blocks are made when they are first wanted
    seconds = [timed(lambda: step(model, ids(1)[0], cache).argmax().item()) for _ in range(STEPS - 1)]
    return Point(position, 1, Spread.of(seconds).median)


def tables(growth: Growth, markdown: bool) -> str:
    if not growth.prefill:
        rows = [[f"{point.position:,}", number(point.seconds * 1e3)] for point in growth.decode]
        return "\n\n".join([table(("tokens before", "decode, ms per token"), rows, markdown), _fits(growth, markdown)])
    rows, spent = [], 0.0
    starts = [point.position for point in growth.prefill]
    at_start = {point.position + STEPS: point for point in growth.decode}
    for point, start in zip(growth.prefill, starts, strict=True):
        decode = at_start.get(start)
        cells = number(decode.seconds * 1e3) if decode else ""
        rows.append([f"{start:,}", cells, number(point.tokens / point.seconds), number(spent)])
        spent += point.seconds
    last = growth.decode[-1]
    rows.append([f"{last.position:,}", number(last.seconds * 1e3), "", number(spent)])
    heads = ("tokens before", "decode, ms per token", "the next piece, tokens/s", "read so far, s")
    return "\n\n".join([table(heads, rows, markdown), _fits(growth, markdown)])


def _fits(growth: Growth, markdown: bool) -> str:
    piece = growth.prefill[0].tokens if growth.prefill else 0
    memory, gemm = (Spread.of([getattr(rate, kind) for rate in growth.rates]) for kind in ("memory", "gemm"))
    fits = []
    for name, found, unit, ceiling in (
        ("decode, ms per token", growth.decode_fit, "GB/s", memory.median),
        (f"a piece of {piece:,} tokens, ms", growth.prefill_fit, "GFLOP/s", gemm.median),
    ):
        if found is not None:
            shares = (
                f"{number(rate / 1e9)} {unit}, {rate / ceiling:.0%}" if rate else "-"
                for rate in (found.chunked_rate, found.full_rate)
            )
            fits.append([name, number(found.constant * 1e3), *shares, f"{found.largest_error:.1%}"])
    fit_heads = ("fitted", "constant", "chunked layers, share of the ceiling", "layers that see all", "largest error")
    below = f"ceilings: memory read {_giga(memory)} GB/s, product {_giga(gemm)} GFLOP/s"
    return f"{table(fit_heads, fits, markdown)}\n\n{below}"


def _giga(spread: Spread) -> Spread:
    return Spread(spread.median / 1e9, spread.low / 1e9, spread.high / 1e9)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llama4 bench growth", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory or Hub id")
    parser.add_argument("--context", type=parse_tokens, default=65536, metavar="N", help="tokens (default: 65536)")
    parser.add_argument("--filled", action="store_true", help="fill the cache with random numbers, and decode alone")
    parser.add_argument(
        "--every", type=positive, default=4096, metavar="N", help="decode after so many (default: 4096)"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], metavar="DTYPE")
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
    places = 0 if options.filled else options.context // options.every + 1
    wanted = options.context + STEPS * places
    if wanted > (window := llm.config.text.max_position_embeddings):
        raise ValueError(
            f"--context {options.context} and what is decoded, {wanted} tokens, are beyond the window, {window}"
        )
    others = Others()
    if options.filled:
        growth = measure_filled(llm, options.context, options.threads)
    else:
        growth = measure(llm, options.context, options.every, options.threads)
    warn_of_others([others.share()])
    if options.json:
        print(json.dumps({"machine": describe(), "model": options.model, **asdict(growth)}, indent=2))
    else:
        print(tables(growth, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
