"""Ctrl-C (SIGINT) at various times of every command that may take long: an answer within a second, exit code 130, one
line, and nothing half written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama4.cli.interrupts import PATIENCE
from tests import small_model

ANSWER = 1.0 + 1.5
"""Seconds: one, and what a machine with other work on it may add."""

STUCK = """
import sys, time, ctypes
import llama4.cli.analysis as analysis
def run(options):
    print("ready", flush=True)
    if sys.argv[1] == "call":
        ctypes.CDLL(None).usleep(60_000_000)  # without the GIL, and not ended by a signal's handler in Python
        ctypes.CDLL(None).usleep(60_000_000)
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor() as pool:  # a download that waits
        pool.submit(time.sleep, 60).result()
analysis.run_info = run
from llama4.__main__ import run
sys.argv = ["llama4", "info", "tiny"]
"""


def interrupted(process: subprocess.Popen[bytes]) -> tuple[float, bytes]:
    """Seconds until it ends, and its stderr."""
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return time.monotonic() - begun, error


@pytest.mark.parametrize("where", ["call", "threads"])
def test_where_python_cannot_answer(where: str) -> None:
    code = STUCK.replace("sys.argv[1]", repr(where)) + "run()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    seconds, error = interrupted(process)
    assert (process.returncode, error) == (130, b"llama4: interrupted\n")
    assert seconds < PATIENCE + ANSWER


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("models") / "model")


COMMANDS = {
    "generate": ["generate", "--model", "{source}", "--max-new-tokens", "4000", "hi"],
    "convert": ["convert", "{source}", "{target}", "--to", "hf"],
    "quantize": ["quantize", "{source}", "{target}", "--scheme", "int8"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("after", [0.4, 1.6])
def test_at_any_time(directory: Path, tmp_path: Path, command: str, after: float) -> None:
    arguments = [part.format(source=directory, target=tmp_path / "target") for part in COMMANDS[command]]
    process = subprocess.Popen(
        [sys.executable, "-m", "llama4", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    time.sleep(after)
    seconds, error = interrupted(process)
    if process.returncode == 0:  # it was done before
        return
    assert (process.returncode, error) == (130, b"llama4: interrupted\n")
    assert seconds < ANSWER
    assert not (tmp_path / "target").exists()
