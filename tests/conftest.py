"""Tests run what is installed, on as many workers as the machine has room for, beside references of known versions."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GIB = 1 << 30


def _test_what_is_installed() -> None:
    """`python -m pytest` puts the checkout on `sys.path`. It stays there only where llama4 is nowhere else, or where
    PYTHONPATH names it. Processes that tests start do the same."""
    named = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    chosen = str(ROOT) in map(os.path.realpath, named)
    path = list(sys.path)
    if not chosen:
        sys.path[:] = [entry for entry in path if os.path.realpath(entry) != str(ROOT)]
    elif editable := [finder for finder in sys.meta_path if type(finder).__module__.startswith("_editable_")]:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in editable]  # which would come first
    if importlib.util.find_spec("llama4") is None:
        if sys.path == path:
            raise pytest.UsageError("llama4 is not installed: pip install '.[test]', or PYTHONPATH=. for the checkout")
        sys.path[:] = path
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *named])
    os.environ["PYTHONSAFEPATH"] = "1"  # `python -c` and `-m` in the checkout do not see it


_test_what_is_installed()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what runs in the background deaf to Ctrl-C, and the processes that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Before torch is imported: threads of several processes that wait for each other on one core are ten times slower.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from PIL import ImageFile  # noqa: E402

from tests.oracles import skip_what_reaches_a_stranger  # noqa: E402


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: a worker per core, 3 GiB of memory each, and no more than eight, as each has torch to import."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * GIB
    count = min(cores, memory // (3 * GIB), 8)
    return count if count > 1 else 0


@pytest.fixture(autouse=True)
def _strict_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta's preprocessing, once imported by another test, lets PIL accept truncated files."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws does not depend on the tests before it, which are others in each run of several workers."""
    random.seed(0)
    if "torch" in sys.modules:  # its generator alone: `torch.manual_seed` keeps a traceback for each device
        sys.modules["torch"].default_generator.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_what_reaches_a_stranger(items)
