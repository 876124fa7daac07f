"""Bytes of generated tokens -> text, as it becomes certain."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Bytes of tokens -> text, held back while a character is incomplete or a stop string may have begun.

    The text ends before the stop string that is complete first (of those, before the longest). Bytes that are no UTF-8
    become U+FFFD; a character that the end cuts off is left out.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self.stop_string: str | None = None  # that which came
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Add bytes; return the text that is certain now."""
        assert not self.stopped
        self._held += self._decoder.decode(data)
        ends = [(at + len(stop), at, stop) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            _, at, self.stop_string = min(ends)
            return self._release(at)
        return self._release(len(self._held) - self._begun())

    def flush(self) -> str:
        """What may have been the beginning of a stop string, once something that is no text comes between."""
        return self._release(len(self._held))

    def finish(self) -> str:
        """What was held back, once no more bytes come."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _begun(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self.stop), default=1) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stop)), 0)
