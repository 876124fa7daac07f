"""Damaged files: each kind of file that is read is changed at random, and loading it either works or ends in a
`Llama4Error` or an `OSError` that says where, within two seconds and 300 MB (child.py).

`python -m tests.faults.damage [TRIES] [SEED] [KIND]` tries many and prints, for every kind, how many were tried and
failed.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tests.faults.child import call
from tests.faults.kinds import Kind, kinds, linked
from tests.faults.tally import Tally


def attempt(kind: Kind, data: bytes) -> str | None:
    """What is wrong with how a damaged file is read; None if nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        linked(kind.directory, directory)
        (directory / kind.file).unlink()
        (directory / kind.file).write_bytes(data)
        ended = call(lambda: _without_threads(lambda: kind.load(directory)))
    if ended.error == "ConfigError" and "configuration" not in ended.message and kind.file not in ended.message:
        return f"the message names no file: {ended.message[:150]}"
    return ended.problem


def _without_threads(action: Callable[[], object]) -> None:
    """Call a function that leaves no thread, but the one in which masks are computed for the whole process. Those of a
    closed pool may end a moment later."""
    before = set(threading.enumerate())
    try:
        action()
    finally:
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("llama4 masks"):
                continue
            thread.join(timeout=10)
            assert not thread.is_alive(), f"left the thread {thread.name}"


def run(tries: int, seed: int, root: Path, *, only: str = "") -> Tally:
    """Damage every kind of file so many times."""
    tally = Tally()
    for kind in kinds(root):
        if only not in kind.name:
            continue
        data = (kind.directory / kind.file).read_bytes()
        kind.load(kind.directory)
        dice = random.Random(f"{seed} {kind.name}")
        for i in range(tries):
            tally.note(kind.name, attempt(kind, kind.change(data, dice)), str(i))
    return tally


def main(arguments: list[str]) -> int:
    tries, seed = (int(each) for each in [*arguments, *("100", "0")[len(arguments) :]][:2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        tally = run(tries, seed, Path(root), only="".join(arguments[2:]))
    print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
