"""argparse with one line for a mistake, which names the nearest of what there is."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from llama4.errors import nearest

USAGE = 2
"""Exit code for a command that is not written right."""


class Parser(argparse.ArgumentParser):
    """Of the command and, through it, of each of its commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """An option that is not known is an error of the command that it was given to."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = self._option_string_actions if name.startswith("-") else ()
            self.error(f"{name} is not known{nearest(name, known)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            reason = f"{value!r} is not known{nearest(str(value), choices)}; choose one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, reason)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(USAGE)
