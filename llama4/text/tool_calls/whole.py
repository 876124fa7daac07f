"""The text of a reply that is held to a form, as it comes -> that text, or the one tool call that it is."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from llama4.text.tool_calls.call import ToolCall
from llama4.text.tool_calls.spellings import read_spelled


@dataclass(frozen=True)
class CutCall:
    """A call whose reply ended before it was complete: its name, and the JSON of its arguments as far as they came."""

    name: str
    arguments: str


class WholeCallReader:
    """Reads a reply whose form is a tool call or has one as an alternative: `{"name": ..., "parameters": {...}}` and
    nothing else. Text that can be no call comes at once, whatever stands in it; a call when the reply ends.

    Args:
        known: names of the functions that may be called.
    """

    def __init__(self, known: Collection[str]) -> None:
        self._beginnings = {
            name: f'{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": {{' for name in known
        }
        self._held: str | None = ""
        """All that came, as long as it may be a call."""

    def push(self, text: str) -> list[str]:
        """Take more text; return what is text for certain."""
        if self._held is None:
            return [text] if text else []
        self._held += text
        if any(self._held.startswith(begun[: len(self._held)]) for begun in self._beginnings.values()):
            return []
        text, self._held = self._held, None
        return [text]

    def finish(self) -> list[str | ToolCall | CutCall]:
        """The rest of a reply that has ended."""
        text, self._held = self._held, None
        if not text:
            return []
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            for name, begun in self._beginnings.items():
                if text.startswith(begun):
                    return [CutCall(name, text[len(begun) - 1 :])]
            return [text]
        call = read_spelled(text, frozenset(self._beginnings)) if whole.keys() == {"name", "parameters"} else None
        return [call or text]
