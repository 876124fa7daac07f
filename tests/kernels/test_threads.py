"""Threads of the compiled kernels: how many, on a busy machine, in forked processes, and beside those of torch."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4 import Llama4
from llama4.engine import choice
from llama4.engine.sampling import Sampler
from llama4.errors import ArgumentError
from llama4.kernels import build, cpu, threads
from llama4.model.norm import RMSNorm
from tests.marks import needs_kernels


class TestCount:
    def test_as_many_as_torch_within_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(threads.VARIABLE, raising=False)
        for asked, limit, count in ((1, 8, 1), (4, 8, 4), (4, 2, 2)):
            monkeypatch.setattr(torch, "get_num_threads", lambda asked=asked: asked)
            monkeypatch.setattr(threads, "limit", lambda limit=limit: limit)
            assert threads.count() == count

    def test_the_variable_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "limit", lambda: 2)
        monkeypatch.setenv(threads.VARIABLE, "5")
        assert threads.count() == 5
        for wrong in ("0", "-1", "two", "1.5"):
            monkeypatch.setenv(threads.VARIABLE, wrong)
            with pytest.raises(ArgumentError, match=f"LLAMA4_THREADS is '{wrong}'"):
                threads.count()

    def test_hyperthreads_are_one_core(self, tmp_path: Path) -> None:
        for cpu_, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
            (tmp_path / f"cpu{cpu_}/topology").mkdir(parents=True)
            (tmp_path / f"cpu{cpu_}/topology/thread_siblings_list").write_text(siblings + "\n")
        assert threads.physical_cores(range(4), tmp_path) == 2
        assert threads.physical_cores([0, 2], tmp_path) == 1
        assert threads.physical_cores([0, 1, 7], tmp_path) == 3  # of 7 the system says nothing

    @pytest.fixture
    def two_threads(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Those of torch, and the most that may be."""
        monkeypatch.delenv(threads.VARIABLE, raising=False)
        monkeypatch.setattr(threads, "limit", lambda: 2)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    def test_torch_by_one_thread(self, two_threads: None) -> None:
        """Of the calling thread; another goes on with as many as it had."""
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
            with threads.torch_by_one_thread():
                assert (torch.get_num_threads(), threads.count()) == (1, 2)
                with threads.torch_by_one_thread():
                    assert (torch.get_num_threads(), threads.count()) == (1, 2)
                assert pool.submit(torch.get_num_threads).result() == 2
            assert (torch.get_num_threads(), threads.count()) == (2, 2)

    def test_threads_that_begin_meanwhile_have_as_many_as_before(self, two_threads: None) -> None:
        """torch gives a thread the number that was set last in any; also where it calls torch before the kernels."""
        with ThreadPoolExecutor(1) as early, ThreadPoolExecutor(1) as late, ThreadPoolExecutor(1) as single:
            with threads.torch_by_one_thread():
                assert early.submit(threads.count).result() == 2
                assert early.submit(torch.get_num_threads).result() == 2
                assert torch.get_num_threads() == 1
                torch.set_num_threads(1)
                assert late.submit(torch.get_num_threads).result() == 1
            assert late.submit(threads.count).result() == 2
            single.submit(torch.set_num_threads, 1).result()
            assert single.submit(threads.count).result() == 1, "as it was told"


@needs_kernels
def test_no_openmp_in_the_library() -> None:
    for path in build.directory().glob("*.so"):
        assert b"GOMP_" not in path.read_bytes()


@needs_kernels
def test_callers_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them has the workers, the others compute alone."""
    monkeypatch.setenv(threads.VARIABLE, "3")
    x, weight = torch.randn(3, 1024), torch.randn(2048, 1024)
    expected = cpu.linear(x, weight)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(ours, expected) for ours in pool.map(lambda _: cpu.linear(x, weight), range(200)))


@needs_kernels
def test_torch_has_one_thread_where_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama4.from_pretrained("tiny", progress=False)
    seen: list[int | str] = []

    def watch(owner: type, name: str) -> None:
        call = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            seen.append(name)
            return call(*arguments, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(type(llm.model), "hidden_states")
    watch(Sampler, "__call__")
    monkeypatch.setattr(threads, "count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(choice, "applies_penalties", lambda logits_BV: False)  # so torch does
    llm.chat("Hello", max_new_tokens=2, temperature=1.0, repetition_penalty=1.1)
    assert seen == [1, 2, "__call__", 1, "__call__", 2]
    seen.clear()
    inner = llm.model.language_model.model
    inner.layers[0].register_forward_hook(lambda *_: None)  # what it does comes between kernels
    llm.chat("Another", max_new_tokens=1)
    assert seen == [1, "hidden_states", 2, "__call__"]
    seen.clear()
    inner.norm = type("Own", (RMSNorm,), {})(inner.norm.weight.numel(), inner.norm.eps)  # now torch may do all of it
    llm.chat("A third", max_new_tokens=1)
    assert seen == ["hidden_states", "__call__"]


FORK = """
import os, torch
from llama4.kernels import cpu
x, weight = torch.randn(2, 1024), torch.randn(1024, 1024)
expected = cpu.linear(x, weight)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    equal = all(torch.equal(cpu.linear(x, weight), expected) for _ in range(20))
    os._exit(0 if equal and len(os.listdir("/proc/self/task")) == 3 else 1)
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_has_workers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.VARIABLE, "3")
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="stops processes")
def test_beside_a_busy_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two cores half of the speed is left; a quarter is asked for. Threads that wait for each other at barriers have
    a fifth. Other tests may run beside this one, so it may try several times."""
    monkeypatch.setenv(threads.VARIABLE, str(max(2, threads.limit())))
    llm = Llama4.from_pretrained("tiny", progress=False)
    cache = llm.model.new_cache(1)
    llm.model(torch.tensor([[5]]), cache=cache)

    def milliseconds() -> float:
        taken, end = [], time.perf_counter() + 0.4
        while (begin := time.perf_counter()) < end:
            llm.runner.run([5], cache)
            taken.append((time.perf_counter() - begin) * 1e3)
        return statistics.fmean(taken)

    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(1)]
    try:
        ratios = []
        for _ in range(5):
            for process in busy:
                process.send_signal(signal.SIGSTOP)
            quiet = milliseconds()
            for process in busy:
                process.send_signal(signal.SIGCONT)
            ratios.append(quiet / milliseconds())
            if max(ratios) > 0.25:
                return
        pytest.fail(f"of its speed were left {ratios}")
    finally:
        for process in busy:
            process.kill()
            process.wait()
