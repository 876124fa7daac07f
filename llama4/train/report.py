"""What a run leaves beside its result: metrics as JSON lines while it runs; a curve and a card at its end."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama4.config import CONFIG_FILE
from llama4.files import replace_text, replaced_file, sync_file, writes
from llama4.reading import MAX_INT, read_bytes
from llama4.train.trackers import Tracker
from llama4.version import __version__

logger = logging.getLogger(__name__)

METRICS_FILE, CURVE_FILE, CARD_FILE = "metrics.jsonl", "loss.png", "README.md"

NUMBERS = {"step": None, "loss": 0, "eval_loss": 0, "tokens": 0}
"""Fields of a line that are numbers -> what they count as where they are not there."""
MAX_METRICS_BYTES = 1 << 30

_ADAPTER_TITLE = "# An adapter for"
_ADAPTER = """---
library_name: peft
base_model: {base}
---
{title} {base}

```python
from llama4 import Llama4
llm = Llama4.from_pretrained("{base}", adapter="{name}")
```
"""
_SECTION_BEGIN = "\n## How it was trained\n\nTrained by llama4 "
_SECTION = """{begin}{version} with `llama4 finetune`, from {base}: {steps} steps, {tokens} tokens.

| | |
|---|---|
| loss, first and last step | {first:.4f}, {last:.4f} |
| loss on held-out data, best | {best} |
| data | {data}, SHA-256 `{digest}` |

```json
{settings}
```
"""

_HEAD = re.compile(re.escape(_ADAPTER.format(base="@", title=_ADAPTER_TITLE, name="@")).replace("@", ".*"))
_OWN_SECTION = re.compile(
    re.escape(_SECTION_BEGIN) + r"(?:(?!\n#{1,2} ).)*?(?:\n```json\n(?:(?!\n#).)*?\n```\n|(?=\n#{1,2} )|\Z)", re.DOTALL
)
"""Up to the settings' end; without them, up to the next heading."""

Lines = Sequence[Mapping[str, Any]]
"""Of a file of metrics."""


@dataclass(frozen=True)
class Facts:
    """What a run was, for its card.

    Attributes:
        base: the model that it began with.
        data: the file or data set, and its SHA-256.
        settings: see `TrainingOptions.describe`.
    """

    base: str
    data: str
    digest: str
    settings: Mapping[str, object]


class Metrics:
    """A file of JSON lines, one for each step and each evaluation, and what they said.

    Args:
        directory: where it is.
        upto: of lines that are there, those up to this step are kept, and later ones go; 0 for none.
        trackers: get the numbers of every line, too.
    """

    def __init__(self, directory: Path, upto: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._trackers = directory / METRICS_FILE, list(trackers)
        with writes(self._path):
            directory.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in read_metrics(directory) if upto and line.get("step", 0) <= upto]
        replace_text(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, **values: Any) -> None:
        self.lines.append(values)
        with writes(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        numbers = {name: value for name, value in values.items() if type(value) in (int, float) and name != "step"}
        for tracker in self._trackers[:]:
            try:
                tracker.log(values["step"], numbers)
            except Exception as error:  # a stranger's package and network: the training goes on, and its file is whole
                self._trackers.remove(tracker)
                logger.warning("report_to: %s gets no more metrics: %s", type(tracker).__name__, error)

    def sync(self) -> None:
        """Make what was added last through a power failure."""
        with writes(self._path):
            sync_file(self._path)

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the lines that have one."""
        return values_of(self.lines, name)


def values_of(lines: Lines, name: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have one."""
    return [(line["step"], line[name]) for line in lines if name in line]


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


def _forget(card: Path) -> None:
    """What an earlier run said in a card goes; the card, too, if nothing of a user's or a model's is in it."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    rest = _OWN_SECTION.sub("", text)
    if not _HEAD.sub("", rest).strip():
        card.unlink()
    elif rest != text:
        replace_text(card, rest)


def write_curve(directory: Path, lines: Lines) -> None:
    """The losses over the steps, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        if points := values_of(lines, name):
            axes.plot(*zip(*points, strict=True), label=label, marker="." if name == "eval_loss" else None)
    axes.legend(frameon=False)
    with replaced_file(directory / CURVE_FILE) as file:
        figure.savefig(file, dpi=150, format="png")


def write_card(directory: Path, lines: Lines, facts: Facts) -> None:
    """What was trained on what, with which losses: at the end of the card of a model, or in one of the adapter's own,
    beside what a user added to it. A card that a user wrote of an adapter stays as it is."""
    card, is_adapter = directory / CARD_FILE, "lora" in facts.settings and not (directory / CONFIG_FILE).exists()
    _forget(card)
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if is_adapter:
        head = _ADAPTER.format(base=facts.base, title=_ADAPTER_TITLE, name=directory.name)
        if text and f"\n{_ADAPTER_TITLE} " not in text:
            return
        text = _HEAD.sub(lambda _: head, text, count=1) if text else head
    losses, held_out = values_of(lines, "loss"), values_of(lines, "eval_loss")
    section = _SECTION.format(
        begin=_SECTION_BEGIN,
        base=facts.base or "a model without a name",
        version=__version__,
        steps=losses[-1][0],
        tokens=sum(int(line.get("tokens", 0)) for line in lines),
        first=losses[0][1],
        last=losses[-1][1],
        best=f"{min(value for _, value in held_out):.4f}" if held_out else "not measured",
        data=facts.data,
        digest=facts.digest,
        settings=json.dumps(facts.settings, indent=2),
    )
    replace_text(card, text + section)
