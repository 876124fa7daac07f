"""Ctrl-C (SIGINT) and SIGTERM at various times of every command that may take long: an answer within a second, exit
code 130 or 143, one line, and nothing half written."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import httpx
import pytest

from llama4 import Llama4
from llama4.adapters.config import LoraConfig
from llama4.adapters.files import save_adapter
from llama4.adapters.lora import Adapter
from llama4.cli.interrupts import PATIENCE
from llama4.train.state import read_about
from llama4.weights.convert import convert_to_gguf
from tests import small_model

ANSWER = 15.0
"""Seconds: one, and what a machine with much other work on it may add. What is not answered lasts for longer."""

IDLE = 3.0
"""Seconds without any work after which a command is taken to wait for others: for clients, or for its workers."""

BEGUN = 0.4
"""Seconds of the processor's time after which a command answers signals: it takes a tenth of that."""

BENCH = """
import runpy, sys, time
import llama4.bench.generate as generate
def main(options):
    print("ready", flush=True)
    time.sleep(60)
generate.main = main
sys.argv = ["llama4.bench", "generate"]
runpy.run_module("llama4.bench", run_name="__main__")
"""

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


SAID = {signal.SIGINT: b"llama4: interrupted", signal.SIGTERM: b"llama4: terminated"}


def interrupted(process: subprocess.Popen[bytes], by: signal.Signals = signal.SIGINT) -> tuple[float, bytes]:
    """Seconds until it ends, and its stderr."""
    begun = time.monotonic()
    process.send_signal(by)
    _, error = process.communicate(timeout=60)
    return time.monotonic() - begun, error


@pytest.mark.parametrize("by", SAID)
@pytest.mark.parametrize("where", ["call", "threads"])
def test_where_python_cannot_answer(where: str, by: signal.Signals) -> None:
    code = STUCK.replace("sys.argv[1]", repr(where)) + "run()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    seconds, error = interrupted(process, by)
    assert (process.returncode, error) == (128 + by, SAID[by] + b"\n")
    assert seconds < PATIENCE + ANSWER


def test_a_benchmark_alone() -> None:
    """`python -m llama4.bench` ends as `llama4 bench` does."""
    process = subprocess.Popen([sys.executable, "-c", BENCH], stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    _, error = interrupted(process)
    assert (process.returncode, error) == (130, SAID[signal.SIGINT] + b"\n")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def made(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands work with."""
    folder = tmp_path_factory.mktemp("made")
    llm = Llama4.from_pretrained(directory, progress=False)
    config = LoraConfig(rank=2, targets=("attention", "experts"))
    save_adapter(Adapter.create(llm.model, config), llm.model, folder / "adapter")
    convert_to_gguf(directory, folder / "a.gguf", "f32", progress=False)
    (folder / "text").write_text("the cat sat on the mat " * 2000)
    (folder / "data.jsonl").write_text('{"prompt": "say", "completion": "it is what it is"}\n' * 2000)
    return {"source": directory, **{path.stem: path for path in folder.iterdir()}}


COMMANDS = {
    "merge": ["merge", "{source}", "{adapter}", "{target}"],
    "to GGUF": ["convert", "{source}", "{target}.gguf"],
    "from GGUF": ["convert", "{a}", "{target}", "--to", "hf"],
    "gptq": ["quantize", "tiny", "{target}", "--scheme", "gptq", "--calibration", "{text}"],
    "bench": ["bench", "generate", "{source}", "--rounds", "99"],
    "serve": ["serve", "{source}", "--port", "0"],
    "finetune": ["finetune", "{source}", "--data", "{data}", "--output", "{target}", "--steps", "5000"],
    "generate": ["generate", "--model", "{source}", "--max-new-tokens", "4000", "hi"],
    "convert": ["convert", "{source}", "{target}", "--to", "hf"],
    "quantize": ["quantize", "{source}", "{target}", "--scheme", "int8"],
}


def started(command: str, made: dict[str, Path], target: Path) -> subprocess.Popen[bytes]:
    arguments = [part.format(target=target, **made) for part in COMMANDS[command]]
    return subprocess.Popen([sys.executable, "-m", "llama4", *arguments], stdout=PIPE, stderr=PIPE)


def served(made: dict[str, Path]) -> tuple[subprocess.Popen[bytes], str]:
    """A server that is ready, and its address."""
    process = started("serve", made, Path())
    assert process.stdout is not None and process.stderr is not None
    assert process.stderr.readline() == f"llama4: loading {made['source']}\n".encode()  # at once
    words = b""
    while b"/v1\n" not in words:
        words = process.stdout.readline()
        assert words
    return process, words.split()[-1].decode()


def wait_until_used(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until a process has had so much of the processor's time, or is done, or has had none for a while: it waits.
    Before it has begun, a slow disk may be why."""
    used, since = -1.0, time.monotonic()
    while process.poll() is None and used < seconds and time.monotonic() < since + (IDLE if used >= BEGUN else 60):
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        before, used = used, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        since = since if used == before else time.monotonic()
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("command", "after", "by"),
    [
        *(("generate", BEGUN, by) for by in SAID),
        *((each, 3.0, signal.SIGINT) for each in COMMANDS),
        *((each, 3.0, signal.SIGTERM) for each in ("finetune", "quantize", "bench", "generate")),
    ],
)
def test_at_any_time(made: dict[str, Path], tmp_path: Path, command: str, after: float, by: signal.Signals) -> None:
    """Before it is at its work, and while it may be: after so many seconds of the processor's time."""
    process = started(command, made, tmp_path / "target")
    wait_until_used(process, after)
    seconds, error = interrupted(process, by)
    if process.returncode == 0:  # it was done before
        return
    assert process.returncode == 128 + by, error
    assert seconds < ANSWER
    last = error.splitlines()[-1]
    if command == "finetune" and last != SAID[by]:  # it was at its steps, and has saved the state
        said = re.match(rb"llama4: stopped after (\d+) of 5000 steps; --resume goes on from ", last)
        assert said is not None and read_about(tmp_path / "target")["step"] == int(said[1])
        return
    assert last == SAID[by]
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


STEP = """
import ctypes, signal, sys, time
import llama4.train.loop as loop
def learn(*arguments, **options):
    if case == "late":  # the thread that sees the signal, too, looks for the handler after the main thread called it
        signal.getsignal = lambda number: (time.sleep(0.3), of_signal(number))[1]
    else:  # as a long backward pass: no signal ends it early
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    print("ready", flush=True)
    ctypes.CDLL(None).read(0, ctypes.create_string_buffer(1), 1)
    return step(*arguments, **options)
case, of_signal = sys.argv.pop(1), signal.getsignal
step, loop.learn = loop.learn, learn
from llama4.__main__ import run
sys.argv[0] = "llama4"
run()
"""


@pytest.mark.parametrize("by", SAID)
@pytest.mark.parametrize("case", ["once", "twice", "late"])
def test_a_long_step_of_training(made: dict[str, Path], tmp_path: Path, case: str, by: signal.Signals) -> None:
    """The first signal is answered by words at once, and by the state at the step's end; the second by the end."""
    arguments = [part.format(target=tmp_path / "target", **made) for part in COMMANDS["finetune"]]
    process = subprocess.Popen([sys.executable, "-c", STEP, case, *arguments], stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.send_signal(by)
    while not (line := process.stderr.readline()).startswith(b"stopping after this step, whose state is saved"):
        assert line
    if case == "twice":
        begun = time.monotonic()
        process.send_signal(by)
        process.wait(60)  # `communicate` would close the pipe that the step waits for
        assert (process.returncode, process.stderr.read()) == (128 + by, SAID[by] + b"\n")
        assert time.monotonic() - begun < PATIENCE + ANSWER
        process.communicate()
        return
    _, error = process.communicate(b"x", timeout=60)  # with it the step comes to its end
    assert process.returncode == 128 + by and b"stopped after 1 of 5000 steps; --resume goes on from" in error
    assert read_about(tmp_path / "target")["step"] == 1


API = """
import sys
import llama4.train.loop as loop
def learn(*arguments, **options):
    print("ready", flush=True)
    sys.stdin.read(1)
    return step(*arguments, **options)
step, loop.learn = loop.learn, learn
loop.finetune(*sys.argv[1:], steps=5, progress=False)
"""


def test_a_run_in_python(made: dict[str, Path], tmp_path: Path) -> None:
    """SIGTERM ends the process, as it would have, when the state is saved."""
    arguments = [str(made["source"]), str(made["data"]), str(tmp_path / "target")]
    process = subprocess.Popen([sys.executable, "-c", API, *arguments], stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(b"x", timeout=60)
    assert process.returncode == -signal.SIGTERM and read_about(tmp_path / "target")["step"] == 1


FULL = """
import signal
from llama4.train.stopping import stoppable
try:
    with stoppable():
        signal.raise_signal(signal.SIGTERM)
        raise OSError("the disk is full")
finally:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def test_an_error_after_sigterm_is_told() -> None:
    """The state is not saved, as it was said to be."""
    ended = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.endswith("OSError: the disk is full\n")


def test_an_idle_server(made: dict[str, Path]) -> None:
    """It does not wait for clients that keep a connection, or have asked half a question."""
    process, url = served(made)
    with httpx.Client() as client:
        assert client.get(url.replace("/v1", "/health"), timeout=60).status_code == 200
        half = socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])))
        with half:
            half.send(b"GET /hea")
            seconds, error = interrupted(process)
    assert (process.returncode, error) == (0, b"llama4 no longer serves model\n")
    assert seconds < ANSWER


def test_a_server_that_answers(made: dict[str, Path]) -> None:
    """It says for how long it goes on, and a second Ctrl-C ends it."""
    process, url = served(made)
    assert process.stderr is not None
    endless = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/chat/completions", json=endless, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert b"what is being answered has 30 seconds; Ctrl-C again stops now" in process.stderr.readline()
        assert time.monotonic() - begun < ANSWER
        seconds, _ = interrupted(process)
    assert process.returncode == 130 and seconds < ANSWER
