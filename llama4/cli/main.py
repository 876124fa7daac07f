"""The command `llama4`: its parser, and what a shell expects of a command. Importing this does not import torch."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NoReturn

from llama4.arguments import Parser, PrintableFormatter, report
from llama4.bench.__main__ import BENCHES
from llama4.bench.__main__ import main as run_bench
from llama4.bench.__main__ import usage as bench_usage
from llama4.cli import analysis, chat, checkpoints, finetune, generate, moderate, prune, serve
from llama4.cli.interrupts import Terminated, answered_soon, leave, say_ended
from llama4.version import __version__

BROKEN_PIPE = 141
"""Exit code of a shell's commands that end by SIGPIPE."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. An error a user can cause is one line on stderr, without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())
    options = make_parser().parse_args(arguments)
    try:
        answers_itself = options.run in (chat.run, serve.run)
        with nullcontext() if answers_itself else answered_soon():
            code: int = options.run(options)
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return say_ended(signal.SIGINT)
    except Terminated:
        return say_ended(signal.SIGTERM)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        return report(error, as_json=getattr(options, "json", False))


def command() -> NoReturn:
    """The command of a shell."""
    leave(main())


def make_parser() -> Parser:
    parser = Parser(prog="llama4", description="Ask Llama 4 about text and images.")
    parser.add_argument("--version", action="version", version=f"llama4 {__version__}")
    names = (
        "generate | chat | moderate | serve | info | plan | finetune | teach | prune | "
        "convert | merge | quantize | bench"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar=names)
    generate.add_parser(commands)
    chat.add_parser(commands)
    moderate.add_parser(commands)
    serve.add_parser(commands)
    analysis.add_parsers(commands)
    finetune.add_parser(commands)
    finetune.add_teach_parser(commands)
    prune.add_parser(commands)
    checkpoints.add_parsers(commands)
    bench = commands.add_parser("bench", help="measure speed and quality here", description=bench_usage())
    bench.formatter_class = argparse.RawDescriptionHelpFormatter
    bench.add_argument("name", metavar="NAME", choices=BENCHES, help="what to measure; NAME --help shows its options")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of that")
    bench.set_defaults(run=lambda options: run_bench([options.name, *options.arguments]))
    return parser
