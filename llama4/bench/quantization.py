"""What quantisation schemes cost and keep: bytes, memory, speed, and how far the model is from what it was.

`python -m llama4.bench quantization [--model tiny] [--schemes int4 int8 fp8 ...] [--pictures N] [--json]`

Every scheme is written to disk, and loaded and measured in a process of its own, one after the other; medians of runs
that are warm. The divergence is over the answers to questions about drawings, for a model that knows them
(`--pictures`), else over random tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4 import hub
from llama4.api import EMBEDDED, Llama4
from llama4.bench.machine import peak_bytes, reset_peak, resident_bytes, seconds
from llama4.bench.vqa import evaluate, exam, wilson
from llama4.convert import quantize
from llama4.quantization.schemes import SCHEMES

CORE = ("colour", "shape", "count", "count_shape", "count_colour", "exists", "relation")
"""Kinds of question whose accuracy is pooled."""
REPEATS = 5


@dataclass(frozen=True)
class Task:
    """What to measure a checkpoint by: tokens of a prompt and of a reply, questions per kind."""

    prompt: int
    reply: int
    pictures: int
    threads: int


@dataclass
class Row:
    """A scheme's figures: bytes of the files, MiB, tokens per second, nats per token, and right answers."""

    scheme: str
    bytes_on_disk: int
    peak_mib: float
    prefill: float
    decode: float
    perplexity: float
    divergence: float = 0.0
    right: int = 0
    asked: int = 0


def measure(directory: str, scheme: str, task: Task) -> tuple[Row, Tensor]:
    """In a fresh process: the figures, and the log-probabilities [N, V] that schemes are compared by."""
    torch.set_num_threads(task.threads)
    before = resident_bytes()
    reset_peak()
    llm = Llama4.from_pretrained(directory, progress=False)
    model, vocabulary = llm.model, llm.config.text.vocab_size
    ids = torch.randint(0, vocabulary - 256, (1, task.prompt), generator=torch.Generator().manual_seed(0))

    def prefill() -> None:
        model(ids, cache=model.new_cache(), last_only=True)

    def decode() -> None:
        cache = model.new_cache()
        model(ids[:, :64], cache=cache, last_only=True)
        begin = time.perf_counter()
        for i in range(task.reply):
            model(ids[:, i : i + 1], cache=cache, last_only=True)
        spent.append(time.perf_counter() - begin)

    spent: list[float] = []
    with torch.inference_mode():
        prefill_seconds = seconds(prefill, REPEATS)
        for _ in range(REPEATS + 1):
            decode()
        peak = peak_bytes() - before
        logits, targets = _answers(llm, task.pictures) if task.pictures else (model(ids)[0, :-1], ids[0, 1:])
        log_probabilities = logits.float().log_softmax(-1)
        loss = F.nll_loss(log_probabilities, targets)
        row = Row(
            scheme,
            sum(path.stat().st_size for path in Path(directory).glob("*.safetensors")),
            peak / 2**20,
            task.prompt / prefill_seconds,
            task.reply / statistics.median(spent[1:]),
            loss.exp().item(),
        )
        if task.pictures:
            rows = evaluate(
                lambda batch: [reply.text for reply in llm.chat_batch(batch, max_new_tokens=64)],
                task.pictures,
                seed=1,
                kinds=CORE,
            )
            row.right, row.asked = sum(r.right for r in rows), sum(r.asked for r in rows)
    return row, log_probabilities


def _answers(llm: Llama4, pictures: int) -> tuple[Tensor, Tensor]:
    """Logits at every token of the right answers to fresh questions, and those tokens."""
    kept = list[tuple[Tensor, Tensor]]()
    for kind in CORE:
        for messages, question in exam(kind, pictures, seed=1):
            answer = {"role": "assistant", "content": question.answer}
            begin = llm.processor(messages).input_ids.shape[1]
            whole = llm.processor([*messages, answer], add_generation_prompt=False)
            logits = llm.model(whole.input_ids, pixel_values=whole.pixel_values)[0]
            kept.append((logits[begin - 1 : -1], whole.input_ids[0, begin:]))
    logits, targets = zip(*kept, strict=True)
    return torch.cat(logits), torch.cat(targets)


def compare(name: str, schemes: Sequence[str], task: Task) -> list[Row]:
    """The unquantised model first, then every scheme.

    Raises:
        ValueError: no such model, or one that a scheme is not for.
    """
    source = EMBEDDED.get(name) or hub.resolve(name)
    rows: list[Row] = []
    truth: Tensor | None = None
    spawn = multiprocessing.get_context("spawn")
    for scheme in ("none", *schemes):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(source) if scheme == "none" else Path(folder) / scheme
            if scheme != "none":
                quantize(source, directory, scheme)
            with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
                row, log_probabilities = fresh.submit(measure, str(directory), scheme, task).result()
        truth = log_probabilities if truth is None else truth
        row.divergence = F.kl_div(log_probabilities, truth, log_target=True, reduction="batchmean").item()
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    heads = ("MB on disk", "peak MiB", "prefill/s", "decode/s", "perplexity", "KL")
    lines = [f"{'scheme':<11}" + "".join(f"{head:>11}" for head in heads) + "   right"]
    for row in rows:
        line = f"{row.scheme:<11}{row.bytes_on_disk / 1e6:>11.1f}{row.peak_mib:>11.0f}{row.prefill:>11.0f}"
        line += f"{row.decode:>11.1f}{row.perplexity:>11.4g}{row.divergence:>11.4f}"
        if row.asked:
            low, high = wilson(row.right, row.asked)
            line += f"   {row.right / row.asked:.1%} of {row.asked} ({low:.1%} ... {high:.1%})"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llama4.bench quantization", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="embedded name, directory or Hub id (default: tiny)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, metavar="SCHEME")
    parser.add_argument("--pictures", type=int, default=None, metavar="N", help="questions per kind; 0: random tokens")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt that is timed")
    parser.add_argument("--reply", type=int, default=32, metavar="N", help="tokens that are decoded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    pictures = options.pictures if options.pictures is not None else 100 if options.model in EMBEDDED else 0
    if min(options.prompt, options.reply, options.threads, pictures + 1) < 1 or options.prompt < max(64, options.reply):
        parser.error("--prompt must be at least 64 and --reply, --reply and --threads at least 1, --pictures 0 or more")
    rows = compare(options.model, options.schemes, Task(options.prompt, options.reply, pictures, options.threads))
    print(json.dumps([asdict(row) for row in rows], indent=2) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
