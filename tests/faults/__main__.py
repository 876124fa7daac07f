"""All that files and crashes may do: `python -m tests.faults [--sample N] [--tries N]` prints, for every kind, how many
were tried and how many failed. Without a sample it takes the better part of an hour on two cores."""

from __future__ import annotations

import argparse
import sys

from tests.faults import damage, kills


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--sample", type=int, metavar="N", help="events of each writer at which it is ended (default: all)"
    )
    parser.add_argument("--tries", type=int, default=100, metavar="N", help="damaged files of each kind (default: 100)")
    options = parser.parse_args()
    print("Writers that are ended at an event of their files", flush=True)
    killed = kills.main([] if options.sample is None else ["--sample", str(options.sample)])
    print("Damaged files", flush=True)
    damaged = damage.main([str(options.tries)])
    return 1 if killed or damaged else 0


if __name__ == "__main__":
    sys.exit(main())
