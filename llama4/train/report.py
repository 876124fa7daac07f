"""What a run leaves beside its result: metrics as JSON lines while it runs; a curve and a card at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama4.files import replace_text, replaced_file, sync_file, writes
from llama4.reading import MAX_INT, read_bytes
from llama4.version import __version__

METRICS_FILE, CURVE_FILE, CARD_FILE = "metrics.jsonl", "loss.png", "README.md"

NUMBERS = {"step": None, "loss": 0, "eval_loss": 0, "tokens": 0}
"""Fields of a line that are numbers -> what they count as where they are not there."""
MAX_METRICS_BYTES = 1 << 30

_CARD = """---
library_name: peft
base_model: {base}
---
# An adapter for {base}

Trained by llama4 {version} with `llama4 finetune`: {steps} steps, {tokens} tokens.

```python
from llama4 import Llama4
llm = Llama4.from_pretrained("{base}", adapter="{name}")
```

| | |
|---|---|
| loss, first and last step | {first:.4f}, {last:.4f} |
| loss on held-out data, best | {best} |
| data | {data}, SHA-256 `{digest}` |

```json
{settings}
```
"""


class Metrics:
    """A file of JSON lines, one for each step and each evaluation, and what they said.

    Args:
        directory: where it is.
        upto: of lines that are there, those up to this step are kept, and later ones go; None for none.
    """

    def __init__(self, directory: Path, upto: int | None = None) -> None:
        self._path = directory / METRICS_FILE
        with writes(self._path):
            directory.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(directory) if upto is not None else []
        self.lines = [line for line in lines if line.get("step", 0) <= (upto or 0)]
        if upto is None:  # what an earlier run left is not said of this one
            (directory / CURVE_FILE).unlink(missing_ok=True)
            if _is_ours(directory / CARD_FILE):
                (directory / CARD_FILE).unlink()
        replace_text(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, **values: Any) -> None:
        self.lines.append(values)
        with writes(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Make what was added last through a power failure."""
        with writes(self._path):
            sync_file(self._path)

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the lines that have one."""
        return [(line["step"], line[name]) for line in self.lines if name in line]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run that are whole.

    Raises:
        Llama4Error: no regular file.
    """
    try:
        text = read_bytes(directory / METRICS_FILE, MAX_METRICS_BYTES).decode(errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):  # the process was killed while it wrote
            continue
        if isinstance(content, dict) and all(map(_is_number, map(content.get, NUMBERS, NUMBERS.values()))):
            lines.append(content)
    return lines


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_INT  # type: ignore[arg-type]


def is_finished(directory: Path) -> bool:
    """Whether the run that wrote there came to its end."""
    return any(line.get("finished") for line in read_metrics(directory))


def _is_ours(card: Path) -> bool:
    """Whether a card is there, and one that this library wrote."""
    return card.is_file() and "Trained by llama4" in card.read_text(encoding="utf-8", errors="replace")


def write_curve(directory: Path, metrics: Metrics) -> None:
    """The losses over the steps, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        if points := metrics.values(name):
            axes.plot(*zip(*points, strict=True), label=label, marker="." if name == "eval_loss" else None)
    axes.legend(frameon=False)
    with replaced_file(directory / CURVE_FILE) as file:
        figure.savefig(file, dpi=150, format="png")


def write_card(
    directory: Path, metrics: Metrics, *, base: str, data: str, digest: str, settings: Mapping[str, object]
) -> None:
    """What was trained on what, with which losses. A card that a user wrote stays."""
    card = directory / CARD_FILE
    if card.exists() and not _is_ours(card):
        return
    losses, held_out = metrics.values("loss"), metrics.values("eval_loss")
    text = _CARD.format(
        base=base,
        name=directory.name,
        version=__version__,
        steps=losses[-1][0],
        tokens=sum(int(line.get("tokens", 0)) for line in metrics.lines),
        first=losses[0][1],
        last=losses[-1][1],
        best=f"{min(value for _, value in held_out):.4f}" if held_out else "not measured",
        data=data,
        digest=digest,
        settings=json.dumps(settings, indent=2),
    )
    replace_text(card, text)
