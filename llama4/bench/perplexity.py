"""How well models foretell a text: perplexity as llama-perplexity measures it, so that its figures can stand beside.

`llama4 bench perplexity MODEL [MODEL ...] [--text FILE] [--context N] [--transformers] [--vs llama.cpp=DIRECTORY]`

The text is cut into windows of as many tokens, each read for itself, with BOS in its first place if the tokenizer adds
one; what is foretold in its second half counts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.api import Llama4
from llama4.arguments import Parser
from llama4.bench import llama_cpp
from llama4.bench.report import positive
from llama4.errors import ArgumentError, Llama4Error
from llama4.ops.linear import Linear
from llama4.progress import Bar
from llama4.quantization.weight import QuantizedWeight
from llama4.reading import read_text
from llama4.weights.checkpoint import read_config
from llama4.weights.gguf.files import is_gguf

PROGRAM = "llama-perplexity"
_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Row:
    """The perplexity of a model.

    Attributes:
        bits: per weight of the matrices of its layers, scales included.
        tokens: that were foretold.
        ours, transformers, llama_cpp: None where they were not asked, or cannot run it.
    """

    model: str
    bits: float
    tokens: int
    ours: float
    transformers: float | None = None
    llama_cpp: float | None = None


@torch.inference_mode()
def perplexity(logits: Callable[[Tensor], Tensor], windows: Sequence[Tensor], *, progress: bool = False) -> float:
    """exp of the mean negative log-likelihood of what stands in the second halves of windows.

    Args:
        logits: ids [1, T] -> [1, T, V].
        windows: ids, each [T].
    """
    total, count = 0.0, 0
    with Bar("reading", sum(map(len, windows)), "tokens", shown=progress) as bar:
        for ids_T in windows:
            with bar.step(len(ids_T)):
                first = len(ids_T) // 2
                foretold = logits(ids_T[None])[0, first:-1].float()
                total += F.cross_entropy(foretold, ids_T[first + 1 :], reduction="sum").item()
                count += len(foretold)
    return math.exp(total / count)


def windows_of(llm: Llama4, text: str, length: int, most: int | None = None) -> list[Tensor]:
    """Ids of a text as windows, each [length].

    Raises:
        ArgumentError: no window is full.
    """
    tokenizer = llm.tokenizer
    ids = [tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(text)
    if not 4 <= length <= len(ids):
        raise ArgumentError(f"the text has {len(ids)} tokens, and --context is {length}; give a longer text")
    windows = [torch.tensor(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)][:most]
    for window in windows if tokenizer.adds_bos else ():
        window[0] = tokenizer.bos_id
    return windows


def bits_per_weight(model: nn.Module) -> float:
    """Of the matrices of its layers."""
    size, weights = 0, 0
    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, (Linear, QuantizedWeight)):
            size += sum(part.nbytes for part in module.parameters(recurse=False))
            weights += math.prod(module.shape) if isinstance(module, QuantizedWeight) else module.weight.numel()
    return 8 * size / max(1, weights)


def _transformers(path: Path) -> Callable[[Tensor], Tensor]:
    """Raises:
    Llama4Error: transformers cannot load it.
    """
    from llama4.bench.baselines import load_dense, load_transformers

    if not is_gguf(path) and read_config(path).family == "llama4":
        model = load_transformers(str(path), torch.float32, "sdpa")
    else:
        model = load_dense(path)
    return lambda ids: model(ids, use_cache=False).logits


def _llama_cpp(programs: str, path: Path, text: Path, length: int, windows: int) -> float:
    """Raises:
    Llama4Error: the program fails, or gives no estimate.
    """
    options = ["-c", str(length), "-b", str(length), "--chunks", str(windows), "-t", str(torch.get_num_threads())]
    program, files = Path(programs) / PROGRAM, ["-m", str(path), "-f", str(text)]
    output = llama_cpp.run_program(program, *files, *options, timeout=llama_cpp.TIMEOUT + 60 * windows)
    found = _ESTIMATE.search(output.stdout + output.stderr)
    if found is None:
        raise Llama4Error(f"{program} gives no estimate for {path}: {output.stderr[-300:]}")
    return float(found[1])


def measure(path: Path, text: Path, length: int, most: int | None, *, transformers: bool, programs: str | None) -> Row:
    """One model, in float32 but for what is quantized; `programs` is the directory with llama.cpp's."""
    llm = Llama4.from_pretrained(path, dtype="float32", progress=False)
    windows = windows_of(llm, read_text(text), length, most)
    ours = perplexity(llm.model, windows, progress=True)
    bits, tokens = (
        bits_per_weight(llm.model.language_model),
        sum(len(window) - len(window) // 2 - 1 for window in windows),
    )
    del llm
    others: dict[str, float] = {}
    if transformers:
        others["transformers"] = perplexity(_transformers(path), windows, progress=True)
    if programs is not None and is_gguf(path):
        others["llama_cpp"] = _llama_cpp(programs, path, text, length, len(windows))
    return Row(path.name, bits, tokens, ours, **others)


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    lines = ["| model | bits per weight | ours | transformers | llama.cpp |", "|---|---|---|---|---|"]
    for row in rows:
        figures = " | ".join(map(figure, (row.ours, row.transformers, row.llama_cpp)))
        lines.append(f"| {row.model} | {row.bits:.2f} | {figures} |")
    return "\n".join(lines)


def _programs(text: str) -> str:
    directory = llama_cpp.directory_of(text, PROGRAM)
    if directory is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; write {llama_cpp.NAME}=DIRECTORY")
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="llama4 bench perplexity", description="Perplexity on a text, as llama-perplexity measures it."
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="directories, or GGUF files")
    parser.add_argument("--text", metavar="FILE", required=True, help="in UTF-8")
    parser.add_argument("--context", type=positive, default=512, metavar="N", help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=positive, metavar="N", help="at most so many (default: all)")
    parser.add_argument("--transformers", action="store_true", help="also by transformers, in float32")
    parser.add_argument(
        "--vs", type=_programs, metavar="llama.cpp=DIRECTORY", help=f"also by its {PROGRAM}, of GGUF files"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for name in options.models:
        how: dict[str, Any] = {"transformers": options.transformers, "programs": options.vs}
        rows.append(measure(Path(name), Path(options.text), options.context, options.windows, **how))
        if not options.json:
            print(f"{rows[-1].model}: {rows[-1].ours:.3f}", file=sys.stderr)
    print(json.dumps({"rows": [asdict(row) for row in rows]}) if options.json else table(rows))
    return 0
