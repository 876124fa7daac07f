"""What only an accelerator can show: speed, memory and checks, within a few minutes.

`llama4 bench device --out DIRECTORY [--minutes 8] [--device cuda] [--steps NAME ...] [--dry-run]`

Works offline: weights are random and made on the device. `report.md` is for reading, `results.json` has every figure,
`profiles.md` the kernels that take longest, `experts.json` the fastest backend of the experts by number of tokens,
`log.txt` what was printed. All are there, and whole, at any moment. A dry run takes small shapes and a CPU, and shows
only that every step runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama4.arguments import Parser
from llama4.bench.device import machine
from llama4.bench.device.plan import PLAN, Step
from llama4.bench.device.report import Report
from llama4.bench.device.runner import Runner

ENVIRONMENT = {
    "LLAMA4_CPU_KERNELS": "off",  # a copy of a checkout has none built, and what is measured here is the device
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looks for GPUs without starting CUDA, which does not survive a fork
}
DRY_ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(steps: Sequence[Step], out: Path, *, device: str, minutes: float, dry: bool) -> int:
    """-> 0 if every step ran to its end and no case failed, else 1.

    Raises:
        Llama4Error: the device cannot be used.
        OSError: the directory cannot be written.
    """
    if dry:  # a CPU takes as long as it takes
        steps = [replace(step, seconds=60 * minutes, case_seconds=60 * minutes) for step in steps]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("", encoding="utf-8")
    os.environ.update(ENVIRONMENT | (DRY_ENVIRONMENT if dry else {}))  # the steps' processes inherit it
    report = Report(out, {"minutes": minutes, "dry run": dry, "CPU kernels": "off"} | machine.about())
    runner = Runner(steps, device=device, minutes=minutes, dry=dry, log=log, out=out, report=report)
    runner.run()
    good = [
        result.state == "done" and all(case["state"] != "failed" for case in result.cases.values())
        for result in runner.results
    ]
    print((out / "report.md").read_text(encoding="utf-8"))
    return 0 if all(good) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    names = [step.name for step in PLAN]
    parser = Parser(prog="llama4 bench device", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="for results; made if need be")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="for everything (default: 8)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; it must be more than 0")
    chosen = [step for step in PLAN if step.name in options.steps]
    device = "cpu" if options.dry_run else options.device
    return run(chosen, options.out, device=device, minutes=options.minutes, dry=options.dry_run)
