"""One long prompt: time, memory and the tokens after it.

`llama4 bench long PATH --tokens 131072 [--new 64] [--dtype DTYPE] [--cache-dtype int8] [--json]`

The prompt is read by `llama4.generate`, as `Llama4.chat` reads it; its tokens are random ones. Memory is the most that
the process held, the files of the weights that it maps included. With `--vs transformers` the same prompt goes to
transformers in a process of its own, which gets as long as --limit says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama4.analysis import costs
from llama4.api import Llama4
from llama4.bench.machine import peak_bytes, reset_peak
from llama4.engine.generate import generate
from llama4.engine.sampling import Sampler
from llama4.inputs import Inputs
from llama4.model.device import DTYPES
from llama4.units import bytes_text, parse_tokens, time_text

TRANSFORMERS = """
import json, sys, time, torch
from transformers import Llama4ForConditionalGeneration
name, tokens, vocabulary, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
from llama4.bench.long import random_ids
from llama4.bench.machine import peak_bytes
model = Llama4ForConditionalGeneration.from_pretrained(name, dtype=dtype, attn_implementation="sdpa").eval()
begin = time.perf_counter()
with torch.inference_mode():
    model(random_ids(tokens, vocabulary), logits_to_keep=1)
print(json.dumps({"prefill_seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}))
"""


def random_ids(count: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


def plain_words(llm: Llama4) -> int:
    """Tokens that stand for text and nothing else: the first so many."""
    return min(llm.config.text.vocab_size, llm.config.boi_token_index)


class _Bytes:
    """Stands for a tokenizer: nobody reads what the model says."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b""


def measure(llm: Llama4, tokens: int, new_tokens: int, progress: bool = True) -> dict[str, Any]:
    """Read so many random tokens and go on for some more."""
    ids = random_ids(tokens, plain_words(llm))
    cache = llm.model.new_cache(1, llm.cache_dtype, llm.cache_device)
    inputs = Inputs(ids, torch.ones_like(ids), None)
    events = generate(
        llm.model,
        _Bytes(),
        inputs,
        sampler=Sampler(),
        max_new_tokens=new_tokens,
        max_context=tokens + new_tokens,  # a prompt as long as the window is measured, too
        cache=cache,
        progress=progress,
    )
    begin = time.perf_counter()
    next(events)
    read = time.perf_counter() - begin
    rest = sum(1 for _ in events)
    step = (time.perf_counter() - begin - read) / max(rest, 1)
    dtype = str(llm.model.dtype).removeprefix("torch.")
    return {
        "tokens": tokens,
        "prefill_seconds": read,
        "prefill_tokens_per_second": tokens / read,
        "new_tokens": rest + 1,
        "seconds_per_new_token": step,
        "cache_bytes": cache.num_bytes,
        "cache_bytes_by_formula": costs.cache_bytes(llm.config.text, cache.lengths[0], dtype, str(llm.cache_dtype)),
        "peak_bytes": peak_bytes(),
    }


def transformers(name: str, tokens: int, vocabulary: int, dtype: str, limit: float) -> dict[str, Any]:
    """The same prompt there: its figures, or how it ended."""
    command = [sys.executable, "-c", TRANSFORMERS, name, str(tokens), str(vocabulary), dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"tokens": tokens, "ended": f"not done after {time_text(limit)}"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return {"tokens": tokens, "ended": f"exit code {done.returncode}: {lines[-1][:200]}"}
    return {"tokens": tokens, **json.loads(done.stdout.splitlines()[-1])}


def line(who: str, facts: dict[str, Any]) -> str:
    if "ended" in facts:
        return f"{who}: {facts['tokens']:,} tokens: {facts['ended']}"
    text = f"{who}: {facts['tokens']:,} tokens read in {time_text(facts['prefill_seconds'])}"
    if "cache_bytes" in facts:
        text += (
            f" ({facts['prefill_tokens_per_second']:.0f}/s), then {time_text(facts['seconds_per_new_token'])} for each"
        )
        text += f" of {facts['new_tokens']} more; cache {bytes_text(facts['cache_bytes'])}, by the formula "
        text += bytes_text(facts["cache_bytes_by_formula"])
    return f"{text}; at most {bytes_text(facts['peak_bytes'])} of memory"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llama4 bench long", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PATH", help="embedded name, directory or Hub id")
    parser.add_argument("--tokens", type=parse_tokens, default=131072, metavar="N", help="of the prompt: 131072, 1M")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens to go on for (default: 64)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], metavar="DTYPE")
    parser.add_argument("--quantization", metavar="SCHEME", help="of the weights")
    parser.add_argument("--cache-dtype", default="auto", metavar="DTYPE", help="fp8, int8, int4 (default: the model's)")
    parser.add_argument("--vs", choices=["transformers"], help="whom to give the same prompt")
    parser.add_argument("--limit", type=float, default=600, metavar="S", help="seconds for that (default: 600)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    reset_peak()
    llm = Llama4.from_pretrained(
        options.model, dtype=options.dtype, quantization=options.quantization, cache_dtype=options.cache_dtype
    )
    words, dtype = plain_words(llm), str(llm.model.dtype).removeprefix("torch.")
    results = {"ours": measure(llm, options.tokens, options.new)}
    del llm
    if options.vs:
        results[options.vs] = transformers(options.model, options.tokens, words, dtype, options.limit)
    if options.json:
        print(json.dumps({"model": options.model, **results}, indent=2))
    else:
        print("\n".join(line(who, facts) for who, facts in results.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
