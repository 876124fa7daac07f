"""Inside a step: cases are run one after the other, and each result is on disk before the next begins.

A line of the file is a JSON object with "case" and "state": "begun", then "done", "failed" or "skipped". Figures are
numbers by name; a name says its unit at its end, as in "step_ms" or "copy_gb_s".
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from llama4.bench.device import timing

Figures = dict[str, Any]
NO_TIME = "no time left"


class Skip(Exception):  # noqa: N818  # not an error
    """A case that cannot run here, and why."""


class DeviceLostError(Exception):
    """After an illegal memory access, say, nothing runs on the device in this process."""


class Record:
    """What a step gets.

    Attributes:
        device: where to compute.
        dry: whether shapes are to be small.
        rates: figures of the step "machine", as far as they are known.
        out: a directory for files of its own.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        dry: bool,
        seconds: float,
        rates: Figures,
        out: Path,
        over: Collection[str] = (),
    ) -> None:
        self.device, self.dry, self.rates, self.out = device, dry, rates, out
        self._path, self._over = path, frozenset(over)
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Until the step is ended from outside."""
        return self._end - time.monotonic()

    def case(self, name: str, run: Callable[[], Figures | None], least_seconds: float = 1.0) -> Figures | None:
        """Run one case and write what it gives; None if it gave nothing, failed, or is over from an earlier process.

        Raises:
            DeviceLostError: the device does not answer any more.
        """
        if name in self._over:
            return None
        if self.seconds_left < least_seconds:
            self._write(name, "skipped", reason=NO_TIME)
            return None
        self._write(name, "begun")
        self._forget_peak()
        begin = time.monotonic()
        try:
            figures = dict(run() or {})
            self._synchronize()
        except Skip as skip:
            self._write(name, "skipped", reason=str(skip))
            return None
        except Exception as error:
            traceback.print_exc()
            self._write(name, "failed", seconds=time.monotonic() - begin, reason=_said(error))
            del error  # and with its frames the tensors that they hold
            self._check_device()
            return None
        self._write(name, "done", seconds=time.monotonic() - begin, figures=figures, **self._peak())
        return figures

    def time(self, run: Callable[[], object], budget: float = 0.4, most: int = 50) -> float:
        """Median seconds on the device of several runs, which take `budget` seconds together; of one if dry."""
        return timing.once(run, self.device) if self.dry else timing.seconds(run, self.device, budget, most)

    def profile(self, name: str, prepare: Callable[[], Callable[[], object]]) -> None:
        """A case that writes which kernels take longest in the run that `prepare` gives."""

        def watch() -> Figures:
            kernels, figures = timing.profile(prepare(), self.device)
            self._write(f"profile: {name}", "profile", kernels=kernels)
            return figures

        self.case(f"profile: {name}", watch)

    def _write(self, case: str, state: str, **fields: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, "state": state, **fields}, default=str) + "\n")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget_peak(self) -> None:
        if torch.cuda.is_initialized():  # a case may want to fork processes before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> dict[str, int]:
        """Bytes of tensors on the device at the most, while the case ran."""
        return {"peak_bytes": torch.cuda.max_memory_allocated(self.device)} if self.device.type == "cuda" else {}

    def _check_device(self) -> None:
        try:
            self._synchronize()
        except Exception as error:
            raise DeviceLostError(str(error)) from None


def _said(error: Exception) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:1000]}" if lines else type(error).__name__
