"""One long prompt: time, memory and the tokens after it.

`llama4 bench long PATH --tokens 131072 [--new 64] [--dtype DTYPE] [--cache-dtype int8] [--json]`

The prompt has random tokens and is prefilled as `Llama4.chat` does it. Memory is the peak of the process, mapped weight
files included. With `--vs transformers` the same prompt goes to transformers in a process of its own, which may take
`--limit` seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama4.analysis import costs
from llama4.api import Llama4
from llama4.arguments import Parser
from llama4.bench.engine import EngineConfig
from llama4.bench.engines import BASELINES
from llama4.bench.process_memory import peak_bytes, reset_peak
from llama4.bench.tasks import Task, TimedEngine
from llama4.bench.workers import Worker
from llama4.engine.generate import generate
from llama4.engine.sampling import Sampler
from llama4.inputs import Inputs
from llama4.model.device import DTYPES
from llama4.units import bytes_text, dtype_name, parse_tokens, time_text
from llama4.weights import hub


def random_ids(count: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


def text_vocabulary(llm: Llama4) -> int:
    """Number of ids, from 0 on, that stand for text and not for special tokens."""
    return min(llm.config.text.vocab_size, llm.config.boi_token_index)


class _NoTokenizer:
    """For generating tokens whose text nobody reads."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b""


def measure(llm: Llama4, tokens: int, new_tokens: int, progress: bool = True) -> dict[str, Any]:
    """Prefill `tokens` random tokens and generate some more."""
    ids = random_ids(tokens, text_vocabulary(llm))
    cache = llm.model.new_cache(1, llm.cache_dtype, llm.cache_device)
    inputs = Inputs(ids, torch.ones_like(ids), None)
    events = generate(
        llm.runner,
        _NoTokenizer(),
        inputs,
        sampler=Sampler(),
        max_new_tokens=new_tokens,
        max_context=tokens + new_tokens,  # allows a prompt as long as the window
        cache=cache,
        progress=progress,
    )
    begin = time.perf_counter()
    next(events)
    prefill = time.perf_counter() - begin
    rest = sum(1 for _ in events)
    step = (time.perf_counter() - begin - prefill) / rest if rest else None
    dtype = str(llm.model.dtype).removeprefix("torch.")
    return {
        "tokens": tokens,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": tokens / prefill,
        "new_tokens": rest + 1,
        "seconds_per_new_token": step,
        "cache_bytes": cache.num_bytes,
        "cache_bytes_by_formula": costs.cache_bytes(llm.config.text, cache.lengths[0], dtype, str(llm.cache_dtype)),
        "peak_bytes": peak_bytes(),
    }


def measure_baseline(config: EngineConfig, tokens: int, vocabulary: int, limit: float) -> dict[str, Any]:
    """The same prompt by another engine: its figures, or how it ended."""
    try:
        with Worker(TimedEngine, config, vocabulary, timeout=limit) as worker:
            seconds = worker.call("seconds", Task("prefill", prompt=tokens))
            return {"tokens": tokens, "prefill_seconds": seconds, "peak_bytes": worker.call("peak_bytes")}
    except TimeoutError:
        return {"tokens": tokens, "ended": f"not done after {time_text(limit)}"}
    except ValueError as error:
        return {"tokens": tokens, "ended": str(error)}


def line(engine: str, facts: dict[str, Any]) -> str:
    if "ended" in facts:
        return f"{engine}: {facts['tokens']:,} tokens: {facts['ended']}"
    text = f"{engine}: prefill of {facts['tokens']:,} tokens in {time_text(facts['prefill_seconds'])}"
    if "cache_bytes" in facts:
        text += f" ({facts['prefill_tokens_per_second']:.0f} tokens/s)"
        if (step := facts["seconds_per_new_token"]) is not None:  # the first new one came with the prompt
            text += f", then {time_text(step)} for each of {facts['new_tokens'] - 1} more"
        text += f"; cache {bytes_text(facts['cache_bytes'])}, by the formula "
        text += bytes_text(facts["cache_bytes_by_formula"])
    return f"{text}; peak memory {bytes_text(facts['peak_bytes'])}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="llama4 bench long", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory, GGUF file or Hub id")
    parser.add_argument("--tokens", type=parse_tokens, default=131072, metavar="N", help="of the prompt: 131072, 1M")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")
    parser.add_argument("--dtype", type=dtype_name, default="auto", choices=["auto", *DTYPES], metavar="DTYPE")
    parser.add_argument("--quantization", metavar="SCHEME", help="of the weights")
    parser.add_argument("--cache-dtype", default="auto", metavar="DTYPE", help="fp8, int8, int4 (default: the model's)")
    parser.add_argument("--vs", choices=BASELINES, help="a baseline for the same prompt")
    parser.add_argument(
        "--limit",
        type=float,
        default=600,
        metavar="S",
        help="seconds for its loading and for its prompt (default: 600)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    reset_peak()
    llm = Llama4.from_pretrained(
        options.model, dtype=options.dtype, quantization=options.quantization, cache_dtype=options.cache_dtype
    )
    vocabulary, dtype = text_vocabulary(llm), str(llm.model.dtype).removeprefix("torch.")
    results = {"llama4": measure(llm, options.tokens, options.new)}
    del llm
    if options.vs:
        directory = str(hub.resolve(options.model))
        config = EngineConfig(options.vs, directory, dtype, torch.get_num_threads())
        results[options.vs] = measure_baseline(config, options.tokens, vocabulary, options.limit)
    if options.json:
        print(json.dumps({"model": options.model, **results}, indent=2))
    else:
        print("\n".join(line(engine, facts) for engine, facts in results.items()))
    return 0
