"""`llama4 prune`: a model with fewer experts or layers."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llama4.cli.finetune import READING
from llama4.cli.options import add_hub_options
from llama4.progress import starting


def add_parser(commands: Any) -> None:
    about = (
        "Write a model with the experts and layers that matter most to your data. Heal it afterwards: "
        "finetune --method full, or distill with the old model as the teacher."
    )
    parser = commands.add_parser("prune", help="remove experts or layers", description=about)
    parser.add_argument("source", metavar="SRC", help="a directory or a Hub id, not quantized")
    parser.add_argument("target", metavar="DST", help="the directory to make")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="data it shall do well on, in a form that finetune reads"
    )
    parser.add_argument("--experts", type=int, metavar="N", help="experts to keep in each layer")
    parser.add_argument("--layers", type=int, metavar="N", help="layers to keep")
    parser.add_argument(
        "--merge", action="store_true", help="average each removed expert into the kept one most like it"
    )
    for name in ("batch_tokens", "max_length"):
        parser.add_argument("--" + name.replace("_", "-"), **READING[name])
    add_hub_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    if options.experts is None and options.layers is None:
        options.parser.error("say how many stay: --experts N, --layers N, or both")
    if options.merge and options.experts is None:
        options.parser.error("--merge is of the experts that go: --experts N says how many stay")
    with starting():
        from llama4.train.prune import prune
        from llama4.weights import hub

    reading = {name: getattr(options, name) for name in ("batch_tokens", "max_length")}
    source = hub.resolve(options.source, revision=options.revision, subfolder=options.subfolder)
    pruned = prune(
        source,
        options.target,
        options.data,
        experts=options.experts,
        layers=options.layers,
        merge=options.merge,
        **{name: value for name, value in reading.items() if value is not None},
    )
    gone = sorted(set(range(len(pruned.usage))) - set(pruned.layers))
    experts = f"{len(next(iter(pruned.experts.values())))} experts a layer" if pruned.experts else "no experts"
    without = f", without {', '.join(map(str, gone))}" if gone else ""
    print(f"{options.target}: {len(pruned.layers)} layers{without}, {experts}", file=sys.stderr)
    return 0
