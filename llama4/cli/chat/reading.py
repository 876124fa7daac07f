"""What is typed, line by line: prompt_toolkit in a terminal that can, else readline, else the lines of stdin."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

Complete = Callable[[str], list[str]]
"""A line up to the cursor -> lines that it may become."""

QUOTES = '"""'
"""Begins and ends a message of several lines."""
MAX_HISTORY = 10_000
"""Lines of readline's history file."""


class LineReader:
    """The lines of stdin. Raises EOFError at its end, and KeyboardInterrupt."""

    def __init__(self, *, is_interactive: bool) -> None:
        self.is_interactive = is_interactive

    def read(self, prompt: str) -> str:
        return input(prompt if self.is_interactive else "")

    def close(self) -> None:
        """Called at the end."""


class ReadlineReader(LineReader):
    """Lines that can be edited, with a history and Tab."""

    def __init__(self, history: Path | None, complete: Complete) -> None:
        import readline

        super().__init__(is_interactive=True)
        self._readline, self._history = readline, history
        readline.set_history_length(MAX_HISTORY)
        readline.set_completer_delims("\n")  # it is given the whole line
        readline.set_completer(lambda text, state: _nth(complete(text), state))
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
        if history is not None:
            with suppress(OSError):
                readline.read_history_file(history)

    def close(self) -> None:
        if self._history is not None:
            with suppress(OSError):
                self._readline.write_history_file(self._history)


class PromptReader(LineReader):
    """Messages of several lines (Alt-Enter, Ctrl-J, pasted ones), with a history and Tab."""

    def __init__(self, history: Path | None, complete: Complete) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings

        super().__init__(is_interactive=True)

        def suggest(self: Any, document: Any, event: Any) -> Iterable[Any]:
            before = document.text_before_cursor
            for line in complete(before):
                yield Completion(line, start_position=-len(before), display=shown(line))

        def send(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        def break_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        keys = KeyBindings()
        keys.add("enter")(send)
        keys.add("escape", "enter")(break_line)
        keys.add("c-j")(break_line)
        completer = type("Completions", (Completer,), {"get_completions": suggest})
        self._session: Any = PromptSession(
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=completer(),
            complete_while_typing=False,
            multiline=True,
            key_bindings=keys,
            prompt_continuation=lambda width, number, wraps: " " * width,
        )

    def read(self, prompt: str) -> str:
        return str(self._session.prompt(prompt))


def make_reader(*, is_interactive: bool, is_rich: bool, history: Path | None, complete: Complete) -> LineReader:
    """The best reader that is there; a history that cannot be written is none."""
    if not is_interactive:
        return LineReader(is_interactive=False)
    history = _writable(history)
    if is_rich:
        with suppress(ImportError):
            return PromptReader(history, complete)
    with suppress(ImportError):
        return ReadlineReader(history.with_name(f"{history.name}.readline") if history else None, complete)
    return LineReader(is_interactive=True)


def shown(line: str) -> str:
    """What of a completed line a menu shows: a command, an option, or the last part of a path."""
    name, _, argument = line.rstrip().partition(" ")
    path = argument.strip("'\"")
    return (os.path.basename(path.rstrip("/")) + "/" * path.endswith("/")) if path else name


def _writable(history: Path | None) -> Path | None:
    """The file, for its owner's eyes only."""
    if history is None:
        return None
    try:
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (history, history.with_name(f"{history.name}.readline")):
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return None
    return history


def _nth(lines: list[str], index: int) -> str | None:
    return lines[index] if index < len(lines) else None
