"""A model that was used goes on in a forked process: in its main thread, in threads of it, in a worker pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import torch

from llama4 import Llama4

logging.basicConfig(stream=sys.stdout, format="%(message)s")
torch.set_num_threads(2)
llm = Llama4.from_pretrained("tiny", progress=False)


def ask(i):
    torch.randn(500, 500) @ torch.randn(500, 500)
    return llm.chat(f"What is {i} and {i}? " * 30, max_new_tokens=3).text


def in_threads(i):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(ask, range(3)))


def in_thread_of_worker(connection):
    connection.send(in_threads(0))


before = [ask(i) for i in range(3)]
fork = multiprocessing.get_context("fork")
with ProcessPoolExecutor(2, mp_context=fork) as pool:
    assert list(pool.map(ask, range(3), timeout=60)) == before, "workers"
ours, theirs = fork.Pipe()
child = fork.Process(target=in_thread_of_worker, args=(theirs,))
child.start()
assert ours.poll(60), "threads of a worker"
assert ours.recv() == before
child.join()
assert torch.get_num_threads() == 2
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_forked_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("computes with one thread; for more, load the model in the child") in (2, 3)
    assert result.stdout.endswith("done\n")
