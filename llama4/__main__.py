"""The command `llama4`, and `python -m llama4`."""

from __future__ import annotations

from typing import NoReturn


def run() -> NoReturn:
    """Ctrl-C is answered while the rest is imported, too."""
    from llama4.cli.interrupts import leave, say_interrupted

    try:
        from llama4.cli.main import command

        command()
    except KeyboardInterrupt:
        say_interrupted()
        leave()


if __name__ == "__main__":
    run()
