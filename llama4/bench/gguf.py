"""Files in GGUF beside llama.cpp on the same files: prompts and decoding, file by file.

`llama4 bench gguf FILE ... --vs llama.cpp=DIRECTORY [options of bench generate]`

Each file is a run of `llama4 bench generate`, in which both take turns; the table at the end has medians.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama4.bench import generate
from llama4.bench.report import table, warn_of_other_processes
from llama4.files import replace_text


def summary(reports: Mapping[str, Mapping[str, Any]], markdown: bool = False) -> str:
    """A row per file and task: the medians of the engines, and how many times the peer's ours is."""
    engines = list(dict.fromkeys(f["engine"] for report in reports.values() for f in report["figures"]))
    rows = []
    for file, report in reports.items():
        found = {(f["task"], f["engine"]): f for f in report["figures"] if "roofline_share" in f}
        for task in dict.fromkeys(task for task, _ in found):
            medians = [found[task, engine]["median"] if (task, engine) in found else None for engine in engines]
            ratios = [f"{medians[0] / m:.2f}" if m and medians[0] else "" for m in medians[1:]]
            rows.append([Path(file).stem, task, *(f"{m:.1f}" if m else "" for m in medians), *ratios])
    return table(["", "tokens/s", *engines, *(f"ours / {name}" for name in engines[1:])], rows, markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").splitlines()[0]
    parser = generate.parser("llama4 bench gguf", about, nargs="+", metavar="FILE", help="models in GGUF")
    parser.set_defaults(lengths=[512])
    options = parser.parse_args(arguments)
    reports = {}
    for file in options.model:
        reports[file] = generate.measured(Namespace(**{**vars(options), "model": file}))
        if not options.json:
            print(generate.tables(reports[file], options.markdown), end="\n\n", flush=True)
    content = json.dumps(reports, indent=2)
    if options.save:
        replace_text(options.save, content + "\n")
    print(content if options.json else summary(reports, options.markdown))
    for report in reports.values():
        warn_of_other_processes(report["share_of_other_processes"], report["stolen"])
    return 0
