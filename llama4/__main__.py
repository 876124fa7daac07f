"""The command `llama4`, and `python -m llama4`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Signals are answered while the rest is imported, too."""
    import signal

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `2>&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115

    from llama4.cli.interrupts import Terminated, leave, raise_terminated, say_ended

    try:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, raise_terminated)
        from llama4.cli.main import command

        command()
    except KeyboardInterrupt:
        leave(say_ended(signal.SIGINT))
    except Terminated:
        leave(say_ended(signal.SIGTERM))


if __name__ == "__main__":
    run()
