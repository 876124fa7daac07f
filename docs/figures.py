"""Renders docs/performance.json and docs/faults.json into the pages and the picture: `python docs/figures.py`.

A page has `<!-- figures: NAME -->` and `<!-- end -->`; what stands between is the run NAME with its command, date and
tables (or that it is not measured yet), the summary "speed", or the tables "faults". docs/measure.py and `python -m
tests.faults` write the JSON.
"""

from __future__ import annotations

import json
import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import bars

from llama4.bench.__main__ import BENCHES
from llama4.bench.report import number, table
from llama4.files import replace_text

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "docs" / "faults.json"
RESULTS, PICTURE = ROOT / "docs" / "performance.json", ROOT / "docs" / "performance.svg"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<begin><!-- figures: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
SUMMARY = {
    "prefill, 512 tokens": "prompt of 512 tokens, tokens/s",
    "decode, batch 1": "decoding, tokens/s",
    "decode, batch 4": "decoding 4 sequences, tokens/s",
    "peak memory, MiB": "peak memory, MiB",
}
"""Task -> its column in the summary."""


def load() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def render_run(run: dict[str, Any]) -> str:
    """A run's command, date and tables, in Markdown."""
    words = run["command"].split()
    module, _ = BENCHES[words[words.index("bench") + 1]]
    tables = import_module(f"llama4.bench.{module}").tables(run["report"], markdown=True)
    return f"```\n{run['command']}\n```\n\nMeasured on {run['date']}:\n\n{tables}\n"


def render_summary(run: dict[str, Any]) -> str:
    """The main figures of a run of `bench generate`, a row per engine."""
    report = run["report"]
    figures = {(figure["task"], figure["engine"]): figure for figure in report["figures"]}
    engines = [figure["engine"] for figure in report["figures"] if figure["task"] == "peak memory, MiB"]
    rows = [[engine, *(number(figures[task, engine]["median"]) for task in SUMMARY)] for engine in engines]
    machine = report["machine"]
    below = (
        f"{number(report['parameters'] / 1e6)} million parameters, {number(report['active'] / 1e6)} million active per "
        f"token; {machine['cores']} cores ({machine['cpu']}), torch {machine['torch']}; medians of up to "
        f"{report['rounds']} rounds, {run['date']}."
    )
    return f"{table(['', *SUMMARY.values()], rows, markdown=True)}\n\n{textwrap.fill(below, 140)}\n"


def render_faults(groups: dict[str, Any]) -> str:
    """How often each group of faults was tried, and how often it failed; below, of which kinds, and how often each."""
    rows, kinds = [], []
    for group in groups.values():
        counts = group["counts"]
        tried, failed = (sum(column) for column in zip(*counts.values(), strict=True))
        version = f"{group['version']}, {group['date']}".removeprefix(", ")
        rows.append([group["title"], f"{tried:,}", f"{failed:,}", version])
        alike = len({tried for tried, _ in counts.values()}) == 1
        head = f"**{group['title']}**" + (f" ({tried // len(counts)} of each)" if alike else "")
        told = [
            f"{kind}{'' if alike else f' {tried}'}{f', {failed} failed' if failed else ''}"
            for kind, (tried, failed) in counts.items()
        ]
        kinds.append(textwrap.fill(f"{head}: {'; '.join(told)}.", 140, break_on_hyphens=False))
    return "\n\n".join([table(["", "tried", "failed", "seen"], rows, markdown=True), *kinds]) + "\n"


def render(page: str, results: dict[str, Any]) -> str:
    """The page with every block as the results give it."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "faults":
            text = render_faults(json.loads(FAULTS.read_text(encoding="utf-8")))
        elif name == "speed":
            text = render_summary(results["small"])
        else:
            text = render_run(results[name]) if name in results else "Not measured yet.\n"
        return f"{match['begin']}{text}{match['end']}"

    return BLOCK.sub(block, page)


def main() -> None:
    results = load()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (rendered := render(page, results)) != page:
            replace_text(path, rendered)
    replace_text(PICTURE, bars.draw(results["small"]["report"]))


if __name__ == "__main__":
    main()
