"""Is the code of one checkout as fast as that of another? Interleaved pairs of fresh processes, with intervals.

    python scripts/compare_speed.py OLD_CHECKOUT NEW_CHECKOUT MODEL_DIR --formats bf16 int8 int4 float32 --pairs 9

For each pair and format both checkouts load the model in a process of their own. Then they take turns, sample by
sample, at a prompt of 512 tokens and at decoding with batch 1 and 4; the order within a turn alternates. A pair's
figure is the ratio of the two medians. Each pair also times `import llama4` and `llama4 generate` on the embedded
model in fresh processes. Printed are the median ratio over the pairs, above 1 if the new code is faster, and its 95%
interval by order statistics. The exit code is 1 if an interval lies below 0.97.

Only the public API is used, which both checkouts must have: `Llama4.from_pretrained`, `chat`, `chat_batch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
    "float32": {"dtype": "float32"},
}
"""Name -> arguments of `Llama4.from_pretrained`."""
PROMPT, SHORT, REPLY = 512, 16, 48
"""Tokens of the long prompt, of the prompt before decoding, and decoded after the first."""
LIMIT = 0.97
"""The interval of a ratio must reach it."""


class Model:
    """The measuring side, in a process with one checkout on its path."""

    def __init__(self, directory: str, format: str) -> None:
        from llama4 import Llama4

        self.llm: Any = Llama4.from_pretrained(directory, device="cpu", progress=False, **FORMATS[format])
        self.figures: dict[str, Callable[[], float]] = {
            f"prompt of {PROMPT}": lambda: self._seconds(1, PROMPT, 1),
            "decode, batch 1": lambda: self._step_seconds(1),
            "decode, batch 4": lambda: self._step_seconds(4),
        }
        for figure in self.figures.values():
            figure()

    def _seconds(self, rows: int, tokens: int, new: int) -> float:
        """Of a greedy reply of `new` tokens to random prompts, none of which is in the cache."""
        import torch

        ids = torch.randint(
            0, self.llm.config.boi_token_index, (rows, tokens), generator=torch.Generator().manual_seed(0)
        )
        example = self.llm.processor.complete("a")
        inputs = dataclasses.replace(example, input_ids=ids, attention_mask=torch.ones_like(ids))
        self.llm.cache = None
        begin = time.perf_counter()
        replies = self.llm.chat_batch(inputs, max_new_tokens=new, temperature=0)
        seconds = time.perf_counter() - begin
        if any(reply.usage.completion_tokens != new for reply in replies):
            raise ValueError("a reply ended early; use a model with random weights, which does not stop")
        return seconds

    def _step_seconds(self, rows: int) -> float:
        """Of one decoding step."""
        return (self._seconds(rows, SHORT, 1 + REPLY) - self._seconds(rows, SHORT, 1)) / REPLY


def serve(directory: str, format: str) -> None:
    """Answer names of figures on stdin with seconds on stdout."""
    replies, sys.stdout = sys.stdout, sys.stderr
    model = Model(directory, format)
    print(json.dumps(list(model.figures)), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(model.figures[line.strip()]()), file=replies, flush=True)


class Process:
    """A fresh process that serves a checkout's figures."""

    def __init__(self, checkout: Path, directory: str, format: str) -> None:
        command = [sys.executable, __file__, "--serve", directory, format]
        self._process = subprocess.Popen(
            command, env=environment(checkout), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.figures: list[str] = self._reply()

    def seconds(self, figure: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(figure + "\n")
        self._process.stdin.flush()
        seconds: float = self._reply()
        return seconds

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("a measuring process has ended; its error stands above")
        return json.loads(line)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()


def environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}


def alternating(pair: int) -> tuple[int, int]:
    """Who begins: 0 for the old checkout, 1 for the new."""
    return (0, 1) if pair % 2 == 0 else (1, 0)


def model_ratios(checkouts: Sequence[Path], directory: str, format: str, pair: int, samples: int) -> dict[str, float]:
    """Figure -> old seconds / new seconds, for one pair of processes."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(checkout, directory, format)) for checkout in checkouts]
        ratios = {}
        for figure in processes[0].figures:
            seconds: tuple[list[float], list[float]] = ([], [])
            for turn in range(samples):
                for side in alternating(pair + turn):
                    seconds[side].append(processes[side].seconds(figure))
            ratios[figure] = statistics.median(seconds[0]) / statistics.median(seconds[1])
        return ratios


def command_ratios(checkouts: Sequence[Path], pair: int) -> dict[str, float]:
    """The same of whole commands."""
    commands = {
        "import llama4": ["-c", "import llama4"],
        "first answer of `llama4 generate`": ["-m", "llama4", "generate", "--max-new-tokens", "1", "Hello"],
    }
    ratios = {}
    for name, arguments in commands.items():
        seconds = [0.0, 0.0]
        for side in alternating(pair):
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run(
                    [sys.executable, *arguments],
                    env=environment(checkouts[side]),
                    cwd=folder,
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
            seconds[side] = time.perf_counter() - begin
        ratios[name] = seconds[0] / seconds[1]
    return ratios


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Of the median, by order statistics: the narrowest symmetric pair of them that covers 95%, and its coverage. With
    fewer than six ratios the extremes, which cover less."""
    ordered, n = sorted(ratios), len(ratios)

    def coverage(rank: int) -> float:
        """That the true median lies between the `rank`-th smallest and the `rank`-th largest, from 0."""
        return 1 - 2 * sum(math.comb(n, i) for i in range(rank + 1)) / 2**n

    rank = max((rank for rank in range((n + 1) // 2) if coverage(rank) >= 0.95), default=0)
    return ordered[rank], ordered[n - 1 - rank], max(coverage(rank), 0.0)


def build_kernels(checkout: Path) -> None:
    """If it has none of its own sources. (Before CMakeLists.txt came, kernels were compiled at first use.)"""
    if not (checkout / "CMakeLists.txt").exists():
        return
    missing = "import sys; from llama4.kernels import loader; sys.exit(loader.library() is None)"
    if subprocess.run([sys.executable, "-c", missing], env=environment(checkout), check=False).returncode:
        build = checkout / "llama4" / "kernels" / "build.py"
        subprocess.run([sys.executable, "-I", str(build), "native"], check=True, stdout=sys.stderr)


def compare(options: argparse.Namespace) -> dict[str, list[float]]:
    """Format and figure -> the ratio of each pair."""
    checkouts = [Path(path).resolve() for path in (options.old, options.new)]
    for checkout in checkouts:
        if not (checkout / "llama4").is_dir():
            raise SystemExit(f"{checkout} is no checkout of llama4")
    found: dict[str, list[float]] = {}

    def add(ratios: dict[str, float], prefix: str = "") -> None:
        for name, ratio in ratios.items():
            found.setdefault(prefix + name, []).append(ratio)
            print(f"{prefix}{name}: {ratio:.3f}", file=sys.stderr)

    for checkout in checkouts:
        build_kernels(checkout)
    for checkout in checkouts:  # bytecode is cached before anything is timed
        for format in options.formats:
            with Process(checkout, options.model, format):
                pass
    command_ratios(checkouts, 0)
    for pair in range(options.pairs):
        print(f"pair {pair + 1} of {options.pairs}", file=sys.stderr)
        add(command_ratios(checkouts, pair))
        for format in options.formats:
            directory = str(Path(options.model).resolve())
            add(model_ratios(checkouts, directory, format, pair, options.samples), f"{format}: ")
    return found


def report(found: dict[str, list[float]]) -> Iterator[str]:
    """A line per figure."""
    yield f"{'speed of the new code over that of the old':<46}{'median':>8}   interval"
    for name, ratios in found.items():
        low, high, coverage = interval(ratios)
        note = "" if coverage >= 0.95 else f" (covers {coverage:.0%}: take more pairs)"
        verdict = "" if high >= LIMIT else f"   below {LIMIT}"
        yield f"{name:<46}{statistics.median(ratios):>8.3f}   {low:.3f} to {high:.3f}{note}{verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", metavar="OLD_CHECKOUT")
    parser.add_argument("new", metavar="NEW_CHECKOUT")
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("--formats", nargs="+", default=[*FORMATS], choices=FORMATS, metavar="FORMAT")
    parser.add_argument("--pairs", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="of each figure and pair (default: 5)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all ratios as JSON")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.samples < 1:
        parser.error("--pairs and --samples must be at least 1")
    found = compare(options)
    print("\n".join(report(found)))
    if options.save:
        options.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(interval(ratios)[1] < LIMIT for ratios in found.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        sys.exit(main())
