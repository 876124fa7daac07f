"""Quantization schemes compared: size, memory, speed, divergence from the unquantized model, and accuracy.

`llama4 bench quantization [--model tiny] [--schemes int4 int8 fp8 ...] [--plain] [--pictures N] [--json]`

Every scheme is written to disk, then loaded and measured in a process of its own, one after the other. Speeds are
medians of warm runs. The KL divergence is over the answers to questions about drawings, for a model that knows them
(`--pictures`), else over random tokens. `--plain` adds plain rounding by the package compressed-tensors in the same
format, and the rounding errors of single matrices.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.api import Llama4
from llama4.arguments import Parser
from llama4.bench import rounding_errors
from llama4.bench.absmax_rounding import write_plain
from llama4.bench.peak_rates import median_seconds
from llama4.bench.process_memory import peak_bytes, reset_peak, resident_bytes
from llama4.bench.vqa import evaluate, exam, wilson
from llama4.quantization.schemes import SCHEMES
from llama4.tiny import EMBEDDED
from llama4.tiny.shapes_dataset import KINDS_OF_QUESTION
from llama4.weights import hub
from llama4.weights.convert import quantize

REPEATS = 5
BATCH = 16


@dataclass(frozen=True)
class Task:
    """Tokens of a prompt and of a reply, questions per kind, threads."""

    prompt: int
    reply: int
    pictures: int
    threads: int


@dataclass
class Row:
    """A scheme's figures: bytes of the files, MiB, tokens per second, KL in nats per token, and right answers."""

    scheme: str
    bytes_on_disk: int
    peak_mib: float
    prefill: float
    decode: float
    perplexity: float
    divergence: float = 0.0
    right: int = 0
    asked: int = 0
    right_by_kind: dict[str, int] = field(default_factory=dict)


def measure(directory: str, scheme: str, task: Task) -> tuple[Row, Tensor]:
    """Called in a fresh process: the figures, and the log-probabilities [N, V] for the KL divergence."""
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
            llm.runner.step(ids[:, i], cache)
        spent.append(time.perf_counter() - begin)

    spent: list[float] = []
    with torch.inference_mode():
        prefill_seconds = median_seconds(prefill, REPEATS)
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
                lambda batch: [reply.text for reply in llm.chat_batch(batch, max_new_tokens=64, temperature=0)],
                task.pictures,
                seed=1,
                batch_size=BATCH,
            )
            row.right_by_kind = {r.kind: r.right for r in rows}
            row.right, row.asked = sum(r.right for r in rows), sum(r.asked for r in rows)
    return row, log_probabilities


def _answers(llm: Llama4, pictures: int) -> tuple[Tensor, Tensor]:
    """Logits at every token of the right answers to fresh questions, and those tokens."""
    pairs = list[tuple[Tensor, Tensor]]()
    for kind in KINDS_OF_QUESTION:
        questions = list(exam(kind, pictures, seed=1))
        for start in range(0, pictures, BATCH):
            batch = questions[start : start + BATCH]
            asked = [messages for messages, _ in batch]
            answered = [[*messages, {"role": "assistant", "content": q.answer}] for messages, q in batch]
            whole = llm.processor(answered, add_generation_prompt=False)  # padded on the left
            lengths = whole.attention_mask.sum(1) - llm.processor(asked).attention_mask.sum(1)
            logits = llm.model(
                whole.input_ids,
                pixel_values=whole.pixel_values,
                image_grids=whole.image_grids,
                attention_mask=whole.attention_mask,
            )
            for row, ids, length in zip(logits, whole.input_ids, lengths.tolist(), strict=True):
                pairs.append((row[-length - 1 : -1].clone(), ids[-length:]))
    logits, targets = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(targets)


def compare(name: str, schemes: Sequence[str], task: Task, plain: bool = False) -> list[Row]:
    """The unquantized model first, then every scheme, each followed by plain rounding if `plain`.

    Raises:
        Llama4Error: no such model, one that a scheme does not support, or plain rounding without its package.
    """
    source = hub.resolve(name)
    rows: list[Row] = []
    truth: Tensor | None = None
    spawn = multiprocessing.get_context("spawn")
    ways = [(scheme, write) for scheme in schemes for write in (quantize, write_plain)[: 1 + plain]]
    for scheme, write in [("none", None), *ways]:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / scheme if write else Path(source)
            if write:
                write(source, directory, scheme)
            label = f"{scheme} plain" if write is write_plain else scheme
            with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
                row, log_probabilities = fresh.submit(measure, str(directory), label, task).result()
        truth = log_probabilities if truth is None else truth
        row.divergence = F.kl_div(log_probabilities, truth, log_target=True, reduction="batchmean").item()
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, and, where questions were asked, a table of their kinds."""
    heads = ("MB on disk", "peak MiB", "prefill/s", "decode/s", "perplexity", "KL")
    lines = [f"{'scheme':<16}" + "".join(f"{head:>11}" for head in heads) + "   right"]
    for row in rows:
        line = f"{row.scheme:<16}{row.bytes_on_disk / 1e6:>11.1f}{row.peak_mib:>11.0f}{row.prefill:>11.0f}"
        line += f"{row.decode:>11.1f}{row.perplexity:>11.5g}{row.divergence:>11.5f}"
        if row.asked:
            low, high = wilson(row.right, row.asked)
            line += f"   {row.right / row.asked:.2%} of {row.asked} ({low:.1%} ... {high:.1%})"
        lines.append(line)
    if kinds := rows[0].right_by_kind:
        lines += ["", f"{'right answers':<16}" + "".join(f"{row.scheme:>16}" for row in rows)]
        asked = rows[0].asked // len(kinds)
        lines += [
            f"{kind:<16}" + "".join(f"{row.right_by_kind[kind] / asked:>16.1%}" for row in rows) for kind in kinds
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="llama4 bench quantization", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="embedded name, directory, GGUF file or Hub id (default: tiny)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, metavar="SCHEME")
    parser.add_argument("--plain", action="store_true", help="plain rounding beside each (by compressed-tensors)")
    parser.add_argument("--pictures", type=int, default=None, metavar="N", help="questions per kind; 0: random tokens")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt that is timed")
    parser.add_argument("--reply", type=int, default=32, metavar="N", help="tokens that are decoded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    pictures = options.pictures if options.pictures is not None else 100 if options.model in EMBEDDED else 0
    if min(options.prompt, options.reply, options.threads, pictures + 1) < 1 or options.prompt < max(64, options.reply):
        parser.error("--prompt must be at least 64 and --reply, --reply and --threads at least 1, --pictures 0 or more")
    task = Task(options.prompt, options.reply, pictures, options.threads)
    errors = rounding_errors.measure() if options.plain else None
    rows = compare(options.model, options.schemes, task, options.plain)
    if options.json:
        print(json.dumps({"schemes": [asdict(row) for row in rows], "errors": errors}, indent=2))
    else:
        print(table(rows), *([rounding_errors.table(errors)] if errors else []), sep="\n\n")
    return 0
