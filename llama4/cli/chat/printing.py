"""Replies as they come: text as it is, or Markdown in a terminal that can. In a terminal the model's control characters
are not: it cannot move the cursor, set a title or hide what it wrote."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llama4.arguments import PrintablePieces, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

PERIOD = 0.1
"""Seconds between two drawings of what is not complete yet."""
MAX_DRAWN = 6000
"""Characters of it that are drawn as Markdown."""
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Printer:
    """Text as it is, for pipes and files."""

    is_terminal = False

    def write(self, piece: str) -> None:
        """A piece of a reply."""
        print(piece, end="", flush=True)

    def end(self, remark: str) -> None:
        """A reply has ended; the remark stands in its last line."""
        print(remark)

    def line(self, text: str) -> None:
        """A line of its own, with text of the model."""
        print(printable(text) if self.is_terminal else text)

    def figures(self, tokens: int, seconds: float) -> None:
        """How fast it was: told where somebody looks."""


class TerminalPrinter(Printer):
    """Text without control characters."""

    is_terminal = True

    def __init__(self) -> None:
        self._shown = PrintablePieces()

    def write(self, piece: str) -> None:
        super().write(self._shown(piece))

    def end(self, remark: str) -> None:
        super().end(remark)
        self._shown = PrintablePieces()

    def figures(self, tokens: int, seconds: float) -> None:
        print(speed(tokens, seconds))


class MarkdownPrinter(Printer):
    """Markdown: what is complete is printed once; the block that is being written is drawn again as it grows."""

    is_terminal = True

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.markdown import Markdown

        self._console = console or Console(highlight=False)
        self._live_type, self._markdown = Live, Markdown
        self._reset()

    def _reset(self) -> None:
        self._text, self._next, self._live, self._has_printed = "", 0.0, None, False
        self._shown = PrintablePieces()

    _text: str
    _live: Any

    def write(self, piece: str) -> None:
        self._text += self._shown(piece)
        if self._live is None:
            self._live = self._live_type(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        done, self._text = split_blocks(self._text)
        if done:
            self._live.update("")
            self._print(done)
        begun = time.monotonic()
        if done or begun > self._next:
            self._live.update(_Lines(self._render(self._text[-MAX_DRAWN:]), fits=True), refresh=True)
            took = time.monotonic() - begun
            self._next = begun + max(PERIOD, 10 * took)  # the model computes meanwhile

    def end(self, remark: str) -> None:
        if self._live is not None:
            self._live.update("")
            self._live.stop()
        if self._text.strip():
            self._print(self._text)
        if remark:
            self._console.print(remark.strip(), style="dim", markup=False)
        self._reset()

    def figures(self, tokens: int, seconds: float) -> None:
        self._console.print(speed(tokens, seconds), style="dim", markup=False)

    def _print(self, text: str) -> None:
        if self._has_printed:
            self._console.print()
        self._console.print(_Lines(self._render(text)), end="")
        self._has_printed = True

    def _render(self, text: str) -> Any:
        return self._markdown(text, hyperlinks=False, code_theme="ansi_dark")


class _Lines:
    """Something without the empty lines around it; its last ones, as many as the screen holds, if that is wanted."""

    def __init__(self, content: Any, *, fits: bool = False) -> None:
        self._content, self._fits = content, fits

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        full = [i for i, line in enumerate(lines) if "".join(segment.text for segment in line).strip()]
        lines = lines[full[0] : full[-1] + 1] if full else []
        for line in lines[-max(1, options.max_height - 2) :] if self._fits else lines:
            yield from line
            yield Segment.line()


def make_printer(*, is_terminal: bool, is_rich: bool) -> Printer:
    if is_terminal and is_rich:
        with suppress(ImportError):
            return MarkdownPrinter()
    return TerminalPrinter() if is_terminal else Printer()


def split_blocks(text: str) -> tuple[str, str]:
    """Markdown that is complete, up to an empty line outside code, and the rest."""
    end, at, fence = 0, 0, ""
    for line in text.splitlines(keepends=True):
        at += len(line)
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        elif not fence and not line.strip() and line.endswith("\n"):
            end = at
    return (text[:end], text[end:]) if text[:end].strip() else ("", text)


def speed(tokens: int, seconds: float) -> str:
    """ "34 tokens, 12.3 a second"; the seconds are those since the first token."""
    counted = f"{tokens:,} token{'s' * (tokens != 1)}"
    rate = (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0
    return f"{counted}, {rate:,.{1 if rate < 100 else 0}f} a second" if rate else counted
