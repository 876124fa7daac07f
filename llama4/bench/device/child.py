"""The process of a step. The fork server imports it once, so that a step starts in milliseconds; nothing here may
touch the device before the fork."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from llama4.bench.device.record import DeviceLostError, Record
from llama4.kernels.triton import common

DEVICE_LOST = 3
"""Exit code: the step has to go on in another process."""
PRELOAD = ("llama4.bench.device.child", "llama4.api", "llama4.bench.device.workload", "torch._dynamo")
"""Modules that the fork server imports; the last one is what torch imports when a model is first built on "meta"."""


@dataclass(frozen=True)
class Task:
    """What a step's process is told.

    Attributes:
        lines: the file for its results; log: for what it prints; out: a directory for its own files.
        over: cases that are not to be run again.
    """

    function: str
    lines: Path
    log: Path
    out: Path
    device: str
    dry: bool
    seconds: float
    rates: dict[str, Any] = field(default_factory=dict)
    over: tuple[str, ...] = ()


def main(task: Task) -> None:
    os.setpgid(0, 0)  # its own children end with it
    threading.Thread(target=_end_with_runner, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"\n--- {task.function} ---", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    if task.dry:  # the kernels are interpreted
        common.GPUS[torch.device(task.device)] = common.Gpu(capability=0, multiprocessors=4)
    record = Record(
        task.lines,
        torch.device(task.device),
        dry=task.dry,
        seconds=task.seconds,
        rates=task.rates,
        out=task.out,
        over=task.over,
    )
    module, _, function = task.function.partition(":")
    try:
        with torch.inference_mode():
            getattr(import_module(module), function)(record)
    except DeviceLostError as error:
        print(f"the device is lost to this process: {error}", file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)  # ending in order would want the device


def _end_with_runner() -> None:
    """The process that started this one may be killed: then nothing of it goes on, and holds the device."""
    runner = multiprocessing.parent_process()
    assert runner is not None
    runner.join()
    os.killpg(0, signal.SIGKILL)
