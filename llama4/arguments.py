"""Options of the command line: one line for a mistake, which names the nearest of what there is."""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import sys
from typing import Any, NoReturn

from llama4.errors import ArgumentError, nearest

USAGE = 2
"""Exit code for a command that is not written right."""
MAX_MORE_LINES = 3
"""Lines of a message that are shown behind its first."""
MAX_MESSAGE = 4000
"""Characters of a message; what is in a file may be longer."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""All but tab and line feed, and marks that turn the direction of text round."""


class Parser(argparse.ArgumentParser):
    """Of the command and, through it, of each of its commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """An option that is not known is an error of the command that it was given to, and the first one: what is
        missing may be what was meant."""
        given = list(sys.argv[1:] if args is None else args)
        known = self._option_string_actions
        if not any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            names = [text.partition("=")[0] for text in given[: (*given, "--").index("--")] if text.startswith("--")]
            for name in names:
                if not any(option.startswith(name) for option in known):
                    self.error(f"{name} is not known{nearest(name, known)}")
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                hint = "; --model names the model" if "--model" in known else ""
                self.error(f"{unknown[0]!r:.80} is one argument too many{hint}")
            self.error(f"{name} is not known{nearest(name, known)}")
        return found, unknown

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Readers of ours say by themselves what is wrong."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, ArgumentError):
                raise argparse.ArgumentError(action, str(error.__context__)) from None
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            reason = f"{value!r} is not known{nearest(str(value), choices)}; choose one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, reason)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(USAGE)


def report(error: Exception, *, as_json: bool) -> int:
    """Say what a user caused in one line on stderr, and as JSON where that was asked for; -> the exit code."""
    if as_json:
        print(json.dumps({"error": str(error), "type": type(error).__name__}))
    print(f"llama4: error: {one_line(error)}", file=sys.stderr)
    return USAGE if isinstance(error, ArgumentError) else 1


class PrintableFormatter(logging.Formatter):
    """Of what is logged, in which there may be what a file or a client says."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def one_line(error: Exception) -> str:
    """A message without line breaks; of a long one, such as a list of missing keys, the beginning."""
    first, *more = (line.strip() for line in str(error).splitlines() or [type(error).__name__])
    rest = f"; and {len(more) - MAX_MORE_LINES} more" if len(more) > MAX_MORE_LINES else ""
    line = printable("; ".join([first, *more[:MAX_MORE_LINES]]) + rest)
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 2 :]}"


def printable(text: str) -> str:
    """Text in which each control character is a question mark in a lozenge: no file writes to a terminal."""
    return CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


class PrintablePieces:
    """Pieces of a text -> `printable` pieces. A line break is one line feed, also where a piece ends within it."""

    def __init__(self) -> None:
        self._line_breaks = io.IncrementalNewlineDecoder(None, translate=True)

    def __call__(self, piece: str) -> str:
        return printable(self._line_breaks.decode(piece))
