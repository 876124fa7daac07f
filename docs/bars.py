"""Draws the report of `llama4 bench generate` as bars. A bar is the median, its outline the roofline bound: the speed
if the machine did nothing but read the weights, or nothing but multiply with them, at its measured peak rate."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP = 860, 190, 150, 64
ROW, BAR, GAP = 26, 16, 34
STYLE = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 } .panel { font-weight: 600 } .small { font-size: 11.5px; fill: #57606a }
.ours { fill: #0f766e } .other { fill: #94a3b8 } .bound { fill: none; stroke: #94a3b8; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .ours { fill: #2dd4bf } .other { fill: #64748b }
}
"""


def draw(results: dict[str, Any]) -> str:
    """The content of an SVG file: a panel per task that is counted in tokens, a bar per engine."""
    figures = [figure for figure in results["figures"] if figure["unit"] == "tokens/s"]
    tasks = list(dict.fromkeys(figure["task"] for figure in figures))
    body: list[str] = []
    y = TOP
    for task in tasks:
        own = [figure for figure in figures if figure["task"] == task]
        longest = max(figure["median"] / figure["roofline_share"] for figure in own)
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
    torch = machine["torch"].split("+")[0]
    below = f"medians of {results['rounds']} interleaved rounds; dashed: the roofline bound; torch {torch}"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text class="title" x="16" y="26">{escape(title)}</text>',
        f'<text class="small" x="16" y="{y - 12}">{escape(below)}</text>',
    ]
    return "\n".join([*head, *body, "</svg>", ""])


def _row(figure: dict[str, Any], y: int, scale: float) -> list[str]:
    """Name, outline up to the bound, bar, and its label."""
    name, median, share = figure["engine"], figure["median"], figure["roofline_share"]
    kind = "ours" if name.startswith("llama4") else "other"
    bound, bar, middle = median / share * scale, median * scale, y + BAR - 3.5
    label = f"{median:,.0f}" if median >= 100 else f"{median:.1f}"
    return [
        f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>',
        f'<rect class="bound" x="{LEFT}" y="{y}" width="{bound:.1f}" height="{BAR}"/>',
        f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{bar:.1f}" height="{BAR}"/>',
        f'<text x="{LEFT + max(bound, bar) + 8:.1f}" y="{middle}">{label}'
        f'<tspan class="small" dx="6">{share:.0%} of the roofline</tspan></text>',
    ]
