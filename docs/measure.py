"""Runs the benchmarks and stores their reports in docs/performance.json: `python docs/measure.py DIRECTORY [RUN ...]`.

DIRECTORY holds the models, by the names that the commands have, and the peers: llama.cpp's build directory, two more of
builds that are limited to AVX2 and AVX512 and, as vllm, an environment with vLLM. Without names of runs, all are run
but those of other CPUs, which takes about an hour and a half. All pages are rendered afterwards (figures.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import figures

from llama4.files import replace_text
from llama4.kernels import loader

PEERS = "--vs llama.cpp=build/bin --vs vllm=vllm/bin/python"
AVX2 = "LLAMA4_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
AVX512 = "LLAMA4_CPU=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE"
GENERATE = "llama4 bench generate"
RUNS = {
    "small": f"{GENERATE} small --quantization none int8 int4 fp8 {PEERS} --vs transformers --rounds 3 --limit 20",
    "small-float32": f"{GENERATE} small --dtype float32 {PEERS} --rounds 3 --limit 20",
    "mav": f"{GENERATE} mav --quantization none int8 int4 {PEERS} --rounds 3 --limit 20",
    "small-threads": f"{GENERATE} small --threads 1 2 --rounds 3",
    "profile": "llama4 bench profile small",
    "profile-2048": "llama4 bench profile small --prompt 2048",
    "profile-float32": "llama4 bench profile small --dtype float32",
    "context": "llama4 bench growth small --context 65536",
    "context-filled": "llama4 bench growth tiny --dtype bfloat16 --filled --context 1M",
    "experts": "llama4 bench moe",
    "images": "llama4 bench images",
    "small-vnni": f"{GENERATE} small --quantization none int8 int4 {PEERS} --rounds 3 --limit 8",
    "small-float32-vnni": f"{GENERATE} small --dtype float32 {PEERS} --rounds 3 --limit 8",
    "mav-vnni": f"{GENERATE} mav --quantization none int4 {PEERS} --rounds 3 --limit 8",
    "small-transformers-vnni": f"{GENERATE} small --vs transformers --rounds 3 --limit 20",
    "profile-vnni": "llama4 bench profile small",
    "small-avx512": f"{AVX512} {GENERATE} small --quantization none int8 int4 --vs llama.cpp=build-avx512/bin"
    " --rounds 3 --limit 8",
    "small-avx2": f"{AVX2} {GENERATE} small --quantization none int8 int4 --vs llama.cpp=build-avx2/bin"
    " --rounds 3 --limit 20",
    "small-float32-avx2": f"{AVX2} {GENERATE} small --dtype float32 --vs llama.cpp=build-avx2/bin"
    " --rounds 3 --limit 20",
}
"""Name -> command, as it is typed. Variables before it limit this library and torch to an instruction set."""
LEVELS = {name: "avx512vnni" for name in RUNS if name.endswith(("-vnni", "-avx512", "-avx2"))}
"""Name -> the level of kernels on whose CPUs this is run; the others are run on any."""


def run(command: str, directory: str) -> dict[str, Any]:
    """The report of a benchmark, run in the directory of the models with this checkout's code."""
    print(command, file=sys.stderr)
    words = shlex.split(command)
    program = words.index("llama4")
    done = subprocess.run(
        [sys.executable, "-m", *words[program:], "--json"],
        cwd=directory,
        env={**os.environ, **dict(word.split("=", 1) for word in words[:program]), "PYTHONPATH": str(figures.ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def dump(results: dict[str, Any]) -> str:
    """JSON with numbers of six digits, and a line for each innermost object or list."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    text = json.dumps(rounded, indent=1)
    for innermost in (r"\[[^\[\]{}]*\]", r"\{[^{}]*\}"):
        text = re.sub(innermost, lambda match: " ".join(match[0].split()), text)
    return text + "\n"


def main(directory: str, names: Sequence[str] = ()) -> None:
    if unknown := set(names) - set(RUNS):
        raise SystemExit(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    level = loader.found().level
    for name in names or [name for name in RUNS if LEVELS.get(name, level) == level]:
        report = run(RUNS[name], directory)
        results = figures.load()  # read anew: a long series can be interrupted and resumed
        results[name] = {"command": RUNS[name], "date": str(datetime.date.today()), "report": report}
        replace_text(figures.RESULTS, dump({each: results[each] for each in RUNS if each in results}))
    figures.main()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIRECTORY")
    parser.add_argument("runs", metavar="RUN", nargs="*", default=[])
    options = parser.parse_args()
    main(options.directory, options.runs)
