"""Steps that go wrong, for test_device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from llama4.bench.device.record import DeviceLostError, Figures, Record, Skip


def fine(record: Record) -> None:
    record.case("one", lambda: {"answer_ms": 42.0})


def failing(record: Record) -> None:
    def broken() -> Figures:
        raise RuntimeError("out of luck\nand more")

    def absent() -> Figures:
        raise Skip("is not there")

    record.case("broken", broken)
    record.case("absent", absent)
    record.case("behind", lambda: {"answer_ms": 1.0})


def hanging(record: Record) -> None:
    """With a child that would go on."""

    def hang() -> Figures:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (record.out / "child").write_text(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
        return {}

    record.case("before", lambda: {"answer_ms": 1.0})
    record.case("hangs", hang)
    record.case("behind", lambda: {"answer_ms": 2.0})


def crashing(record: Record) -> None:
    def crash() -> Figures:
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    record.case("crashes", crash)
    record.case("behind", lambda: {"answer_ms": 3.0})


def losing_the_device(record: Record) -> None:
    def lose() -> Figures:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def check() -> None:
        raise DeviceLostError("nothing runs any more")

    record._check_device = check  # type: ignore[method-assign]
    record.case("illegal", lose)
    record.case("behind", lambda: {"answer_ms": 4.0})


def broken_outside_of_cases(record: Record) -> None:
    record.case("one", lambda: {"answer_ms": 1.0})
    raise RuntimeError("no case")


def slow(record: Record) -> None:
    """Each case takes a second of the step's, in no time."""

    def pass_a_second() -> None:
        record._end -= 1

    for i in range(1000):
        record.case(f"{i}", pass_a_second)
