"""Processes that measure: each is another, says what went wrong, and is gone afterwards."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import pytest

from llama4.bench.workers import Worker


def test_answers_from_a_process_of_its_own() -> None:
    with Worker(import_module, "os") as worker:
        assert worker.call("getpid") == worker.pid != os.getpid()
        assert worker.call("getcwd") == os.getcwd()
        with pytest.raises(ValueError, match=r"No such file.*nowhere"):
            worker.call("stat", "/nowhere")
        with pytest.raises(ValueError, match="AttributeError"):
            worker.call("no_such_function")
        assert worker.call("getpid") == worker.pid, "an error does not end it"
    assert not Path(f"/proc/{worker.pid}").exists()


def test_what_cannot_be_made_and_what_dies_is_said() -> None:
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        Worker(import_module, "no_such_module")
    worker = Worker(import_module, "os")
    with pytest.raises(ValueError, match="ended with code 3"):
        worker.call("_exit", 3)
    worker.close()
