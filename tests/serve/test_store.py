"""The file of responses: whatever ends the server, what it said is stored is there."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llama4.errors import ArgumentError
from llama4.serve.errors import RequestError
from llama4.serve.store import Store, Stored

WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from llama4.serve.store import Store, Stored
    begin, store = int(sys.argv[2]), Store(Path(sys.argv[1]))
    for i in range(begin, begin + 100_000):
        store.put(Stored({"id": f"r{i}", "text": "x" * (i * 997 % 9000)}, [{"number": i}]))
        print(i, flush=True)
    """
)


def response(i: int) -> dict[str, Any]:
    return {"id": f"r{i}", "text": "x" * (i * 997 % 9000)}


def test_kills(tmp_path: Path) -> None:
    """Whatever `put` has returned from is there, whole, at every kill; the one that was being written is, or is not."""
    path, dice, count = tmp_path / "store", random.Random(0), 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(path), str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(dice.randrange(1, 60)):
                assert int(writer.stdout.readline()) == count
                count += 1
            writer.send_signal(signal.SIGKILL)
            said = [int(line) for line in writer.stdout.read().splitlines()]
            count += len(said)
        store = Store(path)
        for i in range(count):
            assert store.get(f"r{i}") == Stored(response(i), [{"number": i}])
        assert store.get(f"r{count + 1}") is None
        count += store.get(f"r{count}") is not None
        store.close()
    assert count > 50


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk(tmp_path: Path) -> None:
    """The disk takes no more than so many bytes of a file; what was stored before is read, now and afterwards."""
    path, kept = tmp_path / "store", 0
    store = Store(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with suppress(RequestError):
            while kept < 1000:
                store.put(Stored(response(kept), []))
                kept += 1
        assert 10 < kept < 1000
        with pytest.raises(RequestError, match=r"cannot store the response \(.*free space there, or send store: false"):
            store.put(Stored(response(kept), []))
        assert all(store.get(f"r{i}") for i in range(kept))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    store.put(Stored(response(kept), []))
    store.close()
    store = Store(path)
    assert all(store.get(f"r{i}") == Stored(response(i), []) for i in range(kept + 1))
    store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="files have no modes")
def test_nobody_else_reads_conversations(tmp_path: Path) -> None:
    """Neither the file nor what SQLite has beside it."""
    store = Store(tmp_path / "store")
    store.put(Stored(response(1), []))
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    store.close()
    assert "store-wal" in modes and set(modes.values()) == {0o600}


@pytest.mark.parametrize("place", ["", "missing/store", "file/store"])
def test_where_nothing_can_be_stored(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"responses cannot be stored in .*; choose another --store"):
        Store(tmp_path / place)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file system that nobody writes to")
def test_a_file_system_that_is_read_only() -> None:
    with pytest.raises(ArgumentError, match=r"responses cannot be stored in /proc/store: .*; choose another --store"):
        Store(Path("/proc/store"))
