"""`llama4 convert`, `merge` and `quantize`: one checkpoint -> another."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from llama4.cli.options import add_hub_options
from llama4.progress import starting
from llama4.quantization.schemes import CALIBRATED, SCHEMES
from llama4.reading import read_text
from llama4.units import bytes_text

MAX_SHARD_GB = 10**6


def add_parsers(commands: Any) -> None:
    about = "Write a checkpoint in another layout; the bits of the weights do not change."
    convert = commands.add_parser("convert", help="change a checkpoint's layout", description=about)
    _add_paths(convert, "the directory or GGUF file to make")
    convert.add_argument(
        "--to",
        metavar="LAYOUT",
        help="hf: safetensors; meta: consolidated.NN.pth; gguf: a file (default if DST ends in .gguf)",
    )
    convert.add_argument(
        "--type", metavar="TYPE", help="type of GGUF's weights: f32, f16, bf16 (default), q8_0, q4_0, q4_k_m, mxfp4"
    )
    convert.add_argument(
        "--for",
        dest="reader",
        choices=("llama.cpp",),
        help="program that shall read the GGUF file; a model that it would compute otherwise is refused",
    )
    convert.add_argument("--ranks", type=int, metavar="N", help="number of files in Meta's layout (default: 1)")
    add_hub_options(convert)
    convert.set_defaults(run=run_convert, parser=convert)

    about = "Add an adapter to the weights of its model, for good. Packed weights are rounded after the sum."
    merge = commands.add_parser("merge", help="add an adapter to its model", description=about)
    merge.add_argument("base", metavar="BASE", help="the model: a directory or a Hub id")
    merge.add_argument("adapter", metavar="ADAPTER", help="an adapter's directory, as `finetune` or PEFT writes it")
    merge.add_argument("target", metavar="OUT", help="the directory to make")
    add_hub_options(merge)
    merge.set_defaults(run=run_merge)

    about = "Quantize a checkpoint, in the compressed-tensors format. If interrupted, it continues when run again."
    quantize = commands.add_parser("quantize", help="make a checkpoint smaller", description=about)
    _add_paths(quantize, "the directory to make")
    quantize.add_argument(
        "--scheme", required=True, choices=[*SCHEMES, *CALIBRATED], help="which weights are quantized, and how"
    )
    quantize.add_argument("--calibration", metavar="FILE", help="file of texts to calibrate gptq with")
    quantize.add_argument("--head", action="store_true", help="quantize the output head, too")
    quantize.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest size of a file (default: 5)"
    )
    add_hub_options(quantize)
    quantize.set_defaults(run=run_quantize, parser=quantize)


def _add_paths(parser: argparse.ArgumentParser, target: str) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a directory in Hugging Face's or Meta's layout, a GGUF file or a Hub id"
    )
    parser.add_argument("target", metavar="DST", help=target)


def run_convert(options: argparse.Namespace) -> int:
    with starting():
        from llama4.weights import hub
        from llama4.weights.checkpoint import WRITTEN
        from llama4.weights.convert import convert, convert_to_gguf

    is_file = options.target.lower().endswith(".gguf")
    to: str = options.to or ("gguf" if is_file else "")
    layouts = f"{', '.join(WRITTEN)}, gguf"
    if not to:
        options.parser.error(f"--to is missing, one of {layouts}; only a DST that ends in .gguf says it by itself")
    if to not in (*WRITTEN, "gguf"):
        options.parser.error(f"--to {to}: choose one of {layouts}")
    if (to == "gguf") != is_file:
        made = "a file; let it end in .gguf" if to == "gguf" else "a directory; let it not end in .gguf"
        options.parser.error(f"--to {to} makes of {options.target} {made}")
    for name, value, layout in (
        ("type", options.type, "gguf"),
        ("for", options.reader, "gguf"),
        ("ranks", options.ranks, "meta"),
    ):
        if value is not None and to != layout:
            options.parser.error(f"--{name} is of --to {layout}; --to {to} has none, leave it out")
    source = hub.resolve(options.source, revision=options.revision, subfolder=options.subfolder)
    if to == "gguf":
        kind = options.type or "bf16"
        written = convert_to_gguf(source, options.target, kind, for_llama_cpp=options.reader is not None)
        print(f"{' and '.join(map(str, written))}: GGUF, {kind}", file=sys.stderr)
        return 0
    convert(source, options.target, to, ranks=1 if options.ranks is None else options.ranks)
    print(f"{options.target}: {WRITTEN[to].title} layout", file=sys.stderr)
    return 0


def run_merge(options: argparse.Namespace) -> int:
    with starting():
        from llama4.train.merge import write_merged
        from llama4.weights import hub

    write_merged(
        hub.resolve(options.base, revision=options.revision, subfolder=options.subfolder),
        options.adapter,
        options.target,
    )
    print(f"{options.target}: {options.base} with {options.adapter}", file=sys.stderr)
    return 0


def run_quantize(options: argparse.Namespace) -> int:
    with starting():
        from llama4.weights import hub
        from llama4.weights.convert import quantize

    if not 0 < options.shard_gb <= MAX_SHARD_GB:
        options.parser.error(f"--shard-gb is {options.shard_gb:g}; it must be more than 0, and at most {MAX_SHARD_GB}")
    if (options.scheme in CALIBRATED) != (options.calibration is not None):
        options.parser.error(f"--calibration FILE goes with --scheme {' or '.join(CALIBRATED)}, and with no other")
    place = {"revision": options.revision, "subfolder": options.subfolder}
    if options.calibration is None:
        texts, (source, shards) = None, hub.locate(options.source, **place)
    else:
        texts, source, shards = read_text(options.calibration), hub.resolve(options.source, **place), None
    quantize(
        source,
        options.target,
        options.scheme,
        head=options.head,
        calibration=texts,
        shards=shards,
        max_shard_bytes=int(options.shard_gb * 1e9),
        say=partial(print, file=sys.stderr),
    )
    written = sum(path.stat().st_size for path in Path(options.target).glob("*.safetensors"))
    print(f"{options.target}: {options.scheme}, {bytes_text(written)} of weights", file=sys.stderr)
    return 0
