"""Results -> files: `results.json` with all of them, `report.md` for reading, `profiles.md` with kernels by time.

They are few, and each is written whole and then put in the place of the last: a machine may give few files back, and
go away at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama4.bench.device.runner import Result
from llama4.bench.report import table
from llama4.files import replace_text

TARGETS = (
    ("scout-48", "decode, batch 1, graph", "roofline_share", 0.6),
    *(
        target
        for tokens in (2048, 16384)
        for target in (
            ("scout-4", f"bfloat16: prompt of {tokens}", "share_of_gemm", 0.6),
            ("scout-4", f"fp8: prompt of {tokens}", "times_bfloat16", 1.3),
            ("scout-4", f"transformers: prompt of {tokens}", "times_slower", 5.0),
        )
    ),
    ("scout-4", "transformers: decode, batch 1", "times_slower", 5.0),
    ("vision", "tower", "share_of_gemm", 0.5),
)
"""Step, case, figure, and how much it is to be."""


class Report:
    """Writes what is known by now.

    Args:
        out: the directory.
        about: what is known of the machine and the run, by name.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.out, self.about = out, about

    def __call__(self, results: Sequence[Result]) -> None:
        self._write("results.json", json.dumps({"about": self.about, "steps": as_json(results)}, indent=1) + "\n")
        self._write("report.md", markdown(self.about, results))
        if any(result.profiles for result in results):
            self._write("profiles.md", profiles(results))

    def _write(self, name: str, text: str) -> None:
        replace_text(self.out / name, text)


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    return {
        result.step.name: {
            "state": result.state,
            "reason": result.reason,
            "seconds": round(result.seconds, 1),
            "restarts": result.restarts,
            "cases": list(result.cases.values()),
            "profiles": result.profiles,
        }
        for result in results
    }


def markdown(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    blocks = ["# Seen on a device", table(["", ""], [[name, str(value)] for name, value in about.items()], True)]
    overview = [
        [result.step.name, result.state, f"{result.seconds:.0f}", _counts(result), result.reason] for result in results
    ]
    blocks.append(table(["step", "state", "s", "cases", ""], overview, True))
    blocks.append("## Targets")
    blocks.append(table(["", "target", "seen"], [_target(results, *target) for target in TARGETS], True))
    for result in results:
        blocks += [
            f"## {result.step.name}",
            f"{result.step.about}.",
            *_cases(result),
        ]
    return "\n\n".join(blocks) + "\n"


def _counts(result: Result) -> str:
    states = [case["state"] for case in result.cases.values()]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _target(results: Sequence[Result], step: str, case: str, figure: str, least: float) -> list[str]:
    found = next((result.cases.get(case) for result in results if result.step.name == step), None) or {}
    seen = found.get("figures", {}).get(figure)
    title = f"{step}: {case}: {figure.replace('_', ' ')}"
    return [title, _shown(figure, least), "not seen" if seen is None else _shown(figure, seen)]


def _cases(result: Result) -> Iterator[str]:
    """A table for all cases that give the same figures, and a list of those that give none."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in result.cases.values():
        if case["state"] == "done":
            alike.setdefault(tuple(case["figures"]), []).append(case)
    for names, cases in alike.items():
        rows = []
        for case in cases:
            peak = f"{case['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in case else ""
            rows.append([case["case"], *(_shown(name, case["figures"][name]) for name in names), peak])
        yield table(["", *(name.replace("_", " ") for name in names), "peak GiB"], rows, True)
    others = [case for case in result.cases.values() if case["state"] != "done"]
    if others:
        yield "\n".join(f"- {case['case']}: {case['state']}: {case.get('reason', '')}" for case in others)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if "share" in name:
        return f"{value:.0%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def profiles(results: Sequence[Result]) -> str:
    blocks = ["# Kernels by time"]
    for result in results:
        for name, kernels in result.profiles.items():
            rows = [[k["kernel"], f"{k['ms']:.3f}", f"{k['share']:.1%}", str(k["calls"])] for k in kernels]
            blocks += [f"## {result.step.name}: {name}", table(["kernel", "ms", "share", "calls"], rows, True)]
    return "\n\n".join(blocks) + "\n"
