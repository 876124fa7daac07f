"""Runs the steps one after the other, each in processes that may fail, hang or die."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama4.bench.device.child import DEVICE_LOST, PRELOAD, Task, main
from llama4.bench.device.plan import Step
from llama4.bench.device.record import NO_TIME
from llama4.errors import Llama4Error

POLL_SECONDS = 0.1
RESERVED_SECONDS = 3.0
"""Kept for the last report."""
LEAST_SECONDS = 5.0
"""Below which a step is not begun, or begun again."""


@dataclass
class Result:
    """What is known of a step.

    Attributes:
        state: "waiting", "running", "done", "ended early", "failed" or "skipped".
        cases: its lines, one for each case, in order.
        profiles: name -> kernels.
        restarts: how often it went on in a new process.
    """

    step: Step
    state: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    profiles: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    restarts: int = 0

    def read(self, line: str) -> None:
        entry = json.loads(line)
        if entry["state"] == "profile":
            self.profiles[entry["case"].removeprefix("profile: ")] = entry["kernels"]
        else:
            self.cases[entry["case"]] = entry

    @property
    def begun(self) -> dict[str, Any] | None:
        """The case that is running."""
        return next((case for case in self.cases.values() if case["state"] == "begun"), None)


class Runner:
    """Runs steps within a number of minutes.

    Args:
        steps: in order.
        device: "cuda", "cpu", ...
        dry: whether shapes are to be small.
        log: a file for what steps print.
        out: a directory for what they write.
        report: called with all results whenever there is something new.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        device: str,
        minutes: float,
        dry: bool,
        log: Path,
        out: Path,
        report: Callable[[Sequence[Result]], None],
    ) -> None:
        self.results = [Result(step) for step in steps]
        self._device, self._dry, self._log, self._out, self._report = device, dry, log, out, report
        self._end = time.monotonic() + 60 * minutes - RESERVED_SECONDS
        self._scratch = Path(tempfile.mkdtemp(prefix="llama4-device-"))
        self._context = _context("forkserver")

    def run(self) -> None:
        """Until all steps are over.

        Raises:
            Llama4Error: the device cannot be used at all.
        """
        try:
            self._choose_start_method()
            for result in self.results:
                self._report(self.results)
                if self._seconds_left < LEAST_SECONDS:
                    result.state, result.reason = "skipped", NO_TIME
                    continue
                self._run_step(result)
            self._report(self.results)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _seconds_left(self) -> float:
        return self._end - time.monotonic()

    def _choose_start_method(self) -> None:
        """Forked processes begin at once. Where a driver does not work in one, each process imports torch itself."""
        for method in ("forkserver", "spawn"):
            self._context = _context(method)
            probe = Result(Step("probe", "llama4.bench.device.machine:probe", "", min(60.0, self._seconds_left)))
            self._run_step(probe)
            if probe.state == "done" and all(case["state"] == "done" for case in probe.cases.values()):
                return
        reasons = [probe.reason, *(case.get("reason", "") for case in probe.cases.values())]
        raise Llama4Error(f"{self._device} cannot be used here: {next(filter(None, reasons), '')}; see {self._log}")

    def _run_step(self, result: Result) -> None:
        """Until its function returns, going on in a new process behind the case that ended the last one."""
        begin, result.state = time.monotonic(), "running"
        end = min(begin + result.step.seconds, self._end)
        while True:
            code, reason = self._run_process(result, end)
            result.seconds = time.monotonic() - begin
            culprit = result.begun
            if culprit is not None:
                culprit |= {"state": "failed", "reason": reason or f"the process ended with code {code}"}
            if code == 0:
                cut = any(case.get("reason") == NO_TIME for case in result.cases.values())
                result.state = "ended early" if cut else "done"
                return
            result.reason = reason or result.reason or f"a process ended with code {code}"
            if (culprit is None and code != DEVICE_LOST) or end - time.monotonic() < LEAST_SECONDS:
                ran = any(case["state"] == "done" for case in result.cases.values())
                result.state = "ended early" if ran else "failed"
                return
            result.restarts += 1

    def _run_process(self, result: Result, end: float) -> tuple[int | None, str]:
        """-> its exit code, and why it was ended, if it was."""
        lines = self._scratch / f"{result.step.name}.jsonl"
        read = lines.stat().st_size if lines.exists() else 0
        task = Task(
            function=result.step.function,
            lines=lines,
            log=self._log,
            out=self._out,
            device=self._device,
            dry=self._dry,
            seconds=end - time.monotonic(),
            rates=self._rates(),
            over=tuple(result.cases),
        )
        process = self._context.Process(target=main, args=(task,))
        process.start()
        reason, case, case_end = "", None, end
        while process.is_alive() and not reason:
            process.join(POLL_SECONDS)
            now, before = time.monotonic(), read
            read = _read(result, lines, read)
            if read > before:
                self._report(self.results)
            if result.begun is not case:
                case, case_end = result.begun, now + result.step.case_seconds
            if now > end:
                reason = NO_TIME
            elif case is not None and now > case_end:
                reason = f"ended after {result.step.case_seconds:g} s"
        if reason:
            _kill(process)
        process.join(5)  # one that waits inside a driver cannot be killed
        _read(result, lines, read)
        return process.exitcode, reason

    def _rates(self) -> dict[str, Any]:
        """All figures of the step "machine"."""
        cases = (case for result in self.results if result.step.name == "machine" for case in result.cases.values())
        return {name: value for case in cases for name, value in case.get("figures", {}).items()}


def _context(method: str) -> Any:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([*PRELOAD])
    return context


def _read(result: Result, lines: Path, begin: int) -> int:
    """Take whole lines that are new -> where they end."""
    if not lines.exists():
        return begin
    with lines.open("rb") as file:
        file.seek(begin)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", errors="replace").splitlines():
        result.read(line)
    return begin + len(whole)


def _kill(process: Any) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
