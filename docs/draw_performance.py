"""Draws what `llama4 bench generate ... --json` measured: `python docs/draw_performance.py`.

Reads docs/performance.json, writes docs/performance.svg. A bar is the median, its outline the floor: what the machine
could do if it did nothing but read the weights, or nothing but multiply with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "performance.json", HERE / "performance.svg"

WIDTH, LEFT, RIGHT, TOP = 860, 190, 150, 64
ROW, BAR, GAP = 26, 16, 34
STYLE = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 } .panel { font-weight: 600 } .small { font-size: 11.5px; fill: #57606a }
.ours { fill: #0f766e } .other { fill: #94a3b8 } .floor { fill: none; stroke: #94a3b8; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .ours { fill: #2dd4bf } .other { fill: #64748b }
}
"""


def draw(results: dict[str, Any]) -> str:
    """The content of an SVG file: a panel per task that is counted in tokens, a bar per contestant."""
    figures = [figure for figure in results["figures"] if figure["tokens"]]
    tasks = list(dict.fromkeys(figure["task"] for figure in figures))
    body: list[str] = []
    y = TOP
    for task in tasks:
        own = [figure for figure in figures if figure["task"] == task]
        longest = max(figure["median"] / figure["share_of_floor"] for figure in own)
        scale = (WIDTH - LEFT - RIGHT) / longest
        body.append(f'<text class="panel" x="16" y="{y}">{escape(task)}, tokens per second</text>')
        y += 10
        for figure in own:
            body += _row(figure, y, scale)
            y += ROW
        y += GAP
    machine = results["machine"]
    parameters, cores = results["parameters"] / 1e6, machine["cores"]
    title = f"A model of {parameters:.0f} million parameters on {cores} cores ({machine['cpu']})"
    below = (
        f"medians of {results['rounds']} interleaved rounds; dashed: the floor; torch {machine['torch'].split('+')[0]}"
    )
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text class="title" x="16" y="26">{escape(title)}</text>',
        f'<text class="small" x="16" y="{y - 12}">{escape(below)}</text>',
    ]
    return "\n".join([*head, *body, "</svg>", ""])


def _row(figure: dict[str, Any], y: int, scale: float) -> list[str]:
    """Name, outline up to the floor, bar, and what it says."""
    name, median, share = figure["contestant"], figure["median"], figure["share_of_floor"]
    kind = "ours" if name.startswith("llama4") else "other"
    floor, bar, middle = median / share * scale, median * scale, y + BAR - 3.5
    said = f"{median:,.0f}" if median >= 100 else f"{median:.1f}"
    return [
        f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>',
        f'<rect class="floor" x="{LEFT}" y="{y}" width="{floor:.1f}" height="{BAR}"/>',
        f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{bar:.1f}" height="{BAR}"/>',
        f'<text x="{LEFT + max(floor, bar) + 8:.1f}" y="{middle}">{said}'
        f'<tspan class="small" dx="6">{share:.0%} of the floor</tspan></text>',
    ]


def main() -> None:
    PICTURE.write_text(draw(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
