"""How a directory takes another one's place, and who may write it when."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama4 import files
from llama4.errors import CheckpointError, DiskError
from llama4.files import replaced_file
from llama4.weights import directory as directories
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.convert import convert
from llama4.weights.directory import complete_directory, scratch_directory, work_of
from llama4.weights.locked_folder import locked_folder
from llama4.weights.model_source import ModelSource
from llama4.weights.safetensors import write_safetensors
from llama4.weights.save import save
from llama4.weights.stamps import STAMP
from tests import small_model
from tests.weights.test_meta import make_reference, params, write_meta

SHARD = 100_000


def write(target: Path, text: str = "new", **options: Any) -> None:
    with complete_directory(target, **options) as partial:
        (partial / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory with an older model and things of the user's own."""
    (tmp_path / "out/runs").mkdir(parents=True)
    for name in ("file", "older-1", "notes.txt", "runs/log"):
        (tmp_path / "out" / name).write_text("old")
    return tmp_path / "out"


class TestWhatIsThere:
    @pytest.fixture(params=["exchange", "one by one"], autouse=True)
    def way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param != "exchange":
            error = OSError(38, "Function not implemented")
            monkeypatch.setattr(directories, "exchange", lambda *_: (_ for _ in ()).throw(error))

    def test_what_is_the_users_own_stays_and_is_the_same_file(self, target: Path) -> None:
        with (target / "runs/log").open("a") as log:  # as a training run that goes on has it
            write(target, older=["older-*"])
            log.write(" and more")
        assert names(target) == ["file", "notes.txt", "runs", "runs/log"]
        assert (target / "file").read_text() == "new"
        assert (target / "runs/log").read_text() == "old and more"
        assert names(target.parent) == ["out", *(f"out/{name}" for name in names(target))]

    def test_a_link_stays_one(self, target: Path) -> None:
        link = target.with_name("link")
        link.symlink_to("out")
        write(link)
        assert link.is_symlink()
        assert (target / "file").read_text() == "new"

    def test_permissions(self, target: Path) -> None:
        target.chmod(0o750)
        (target / "file").chmod(0o600)
        umask = os.umask(0o027)
        try:
            with complete_directory(target) as partial:
                for name in ("file", "another"):
                    (partial / name).write_text("new")
            save(small_model.model(), small_model.config(), target.with_name("model"))
        finally:
            os.umask(umask)
        found = {name: stat.S_IMODE((target / name).stat().st_mode) for name in (".", "file", "another")}
        assert found == {".": 0o750, "file": 0o600, "another": 0o640}
        model = target.with_name("model")
        assert stat.S_IMODE(model.stat().st_mode) == 0o750
        assert {stat.S_IMODE(path.stat().st_mode) for path in model.iterdir()} == {0o640}

    def test_from_inside(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The process stays in its directory."""
        monkeypatch.chdir(target)
        write(Path("."))
        assert Path("file").read_text() == "new"
        assert os.path.samefile(".", target)

    def test_a_directory_that_cannot_be_another_one(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As that of a container's volume: the same inode, and nothing beside it."""
        inode = target.stat().st_ino
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
        write(target, older=["older-*"])
        assert names(target) == ["file", "notes.txt", "runs", "runs/log"]
        assert (target.stat().st_ino, names(target.parent)[0]) == (inode, "out")


def test_a_model_that_was_replaced_in_part_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small_model.model(), small_model.config(), target)
    with monkeypatch.context() as patch:
        patch.setattr(directories, "exchange", lambda *_: os.rename("nowhere", "there"))
        patch.setattr(directories, "_move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(small_model.model(1), small_model.config(), target)
    with pytest.raises(CheckpointError, match=r"parts of two models: writing it was broken off.*; write it again"):
        open_checkpoint(target)
    save(small_model.model(1), small_model.config(), target)
    open_checkpoint(target)
    assert (target / "notes.txt").read_text() == "old"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="Not a directory"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


class TestOneAtATime:
    HOLD = (
        "import sys, time\nfrom llama4.weights.directory import complete_directory\n"
        "with complete_directory(sys.argv[1]) as partial:\n"
        "    (partial / 'file').write_text('first')\n    print('there', flush=True)\n    sys.stdin.readline()"
    )

    def hold(self, target: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", self.HOLD, str(target)]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        return other

    def test_one_waits_and_one_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        target = tmp_path / "out"
        with self.hold(target) as other:
            who = rf"process {other.pid} on .*, at work since 20\d\d-.*, is writing {target}"
            with pytest.raises(CheckpointError, match=f"{who}; wait for it, or stop it"):
                write(target, must_be_free=True)
            with caplog.at_level(logging.WARNING):
                waiting = threading.Thread(target=write, args=(target, "second"))
                waiting.start()
                while "waiting: " not in caplog.text:
                    time.sleep(0.05)
            assert not target.exists()
            other.communicate("\n")
            waiting.join()
        assert (target / "file").read_text() == "second"
        assert names(tmp_path) == ["out", "out/file"]

    def test_what_a_killed_one_left_is_cleared(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        with self.hold(target) as other:
            other.kill()
        assert names(tmp_path) == [".out-partial", *(f".out-partial/{n}" for n in ("content", "content/file", "lock"))]
        write(target, must_be_free=True)
        assert names(tmp_path) == ["out", "out/file"]

    def test_anothers_directory_is_not_touched(self, tmp_path: Path) -> None:
        (tmp_path / ".out-partial").mkdir()
        (tmp_path / ".out-partial/model").write_text("mine")
        with pytest.raises(CheckpointError, match=r"\.out-partial is in the way of writing .*; rename or remove it"):
            write(tmp_path / "out")
        assert names(tmp_path) == [".out-partial", ".out-partial/model"]

    def test_many_threads(self, tmp_path: Path) -> None:
        inside, most = 0, 0

        def work() -> None:
            nonlocal inside, most
            for _ in range(10):
                with locked_folder(tmp_path / "here", "working"):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.001)
                    inside -= 1

        with ThreadPoolExecutor(5) as pool:
            for done in [pool.submit(work) for _ in range(5)]:
                done.result()
        assert (most, names(tmp_path)) == (1, [])

    def test_converting_begins_with_the_lock(self, tmp_path: Path) -> None:
        with locked_folder(work_of(tmp_path / "out"), "writing"), pytest.raises(CheckpointError, match="wait for it"):
            convert(tmp_path / "nothing", tmp_path / "out", "hf")


def test_an_upload_has_a_directory_that_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_directory("push-a--b") as directory:
        assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
        (directory / "file").write_text("")
    assert names(tmp_path) == []


def test_leftovers_of_a_file(tmp_path: Path) -> None:
    """Of a process that was killed; not of one that is writing, and not what merely looks alike."""
    (tmp_path / ".file-abcd_f12").write_text("left")
    (tmp_path / ".file-abcd_f12.txt").write_text("mine")
    with replaced_file(tmp_path / "file") as one, replaced_file(tmp_path / "file") as other:
        one.write(b"one")
        other.write(b"other")
    assert names(tmp_path) == [".file-abcd_f12.txt", "file"]
    assert (tmp_path / "file").read_bytes() == b"one"


def test_a_file_that_was_just_made_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread locks it before the one that made it does, and deletes it soon."""
    taken: list[tuple[int, str]] = []

    def try_lock(descriptor: int) -> bool:
        if not taken:
            other = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
            assert original(other)
            taken.append((other, os.readlink(f"/proc/self/fd/{descriptor}")))
        return original(descriptor)

    original = files.try_lock
    with monkeypatch.context() as patched:
        patched.setattr(files, "try_lock", try_lock)
        with replaced_file(tmp_path / "file") as file:
            os.unlink(taken[0][1])
            os.close(taken[0][0])
            file.write(b"whole")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


class TestStamps:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> list[Path]:
        for i in range(2):
            save(small_model.model(i), small_model.config(), tmp_path / str(i), max_shard_bytes=SHARD)
        return sorted((tmp_path / "1").glob("*.safetensors"))

    def test_shards_of_two_models(self, tmp_path: Path, shards: list[Path]) -> None:
        shutil.copy(shards[1], tmp_path / "0")
        message = (
            rf"not written together: {shards[1].name} is of another model, .*save it again; if this is meant, remove"
        )
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "0")
        index = tmp_path / "0/model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["metadata"][STAMP]
        index.write_text(json.dumps(content))
        assert open_checkpoint(tmp_path / "0")[1].names()  # as meant

    def test_an_index_of_another_model(self, tmp_path: Path, shards: list[Path]) -> None:
        shutil.copy(tmp_path / "1/model.safetensors.index.json", tmp_path / "0")
        with pytest.raises(CheckpointError, match=r"not written together: .* and others are of another model"):
            open_checkpoint(tmp_path / "0")

    def test_ranks_of_two_models(self, tmp_path: Path) -> None:
        released = write_meta(tmp_path / "released", make_reference(False), params(False), 2)
        convert(released, tmp_path / "hf", "hf", progress=False)
        for name in "ab":
            convert(tmp_path / "hf", tmp_path / name, "meta", ranks=2, progress=False)
        open_checkpoint(tmp_path / "a")
        shutil.copy(tmp_path / "b/consolidated.01.pth", tmp_path / "a")
        with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is of another model"):
            open_checkpoint(tmp_path / "a")
        shutil.copy(released / "consolidated.01.pth", tmp_path / "b")
        with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is of another model"):
            open_checkpoint(tmp_path / "b")


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    """In the format's own order: the package reads them, and all are aligned."""
    model = small_model.model().half()
    model.language_model.model.norm.weight.data = model.language_model.model.norm.weight.data.float()
    for name in "ab":
        (tmp_path / name).mkdir()
        write_safetensors(ModelSource(model), tmp_path / name, 1 << 30, "stamp")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    tensors = load_file(tmp_path / "a/model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in model.named_parameters())
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    sizes = {"F16": 2, "F32": 4}
    assert all(v["data_offsets"][0] % sizes[v["dtype"]] == 0 for k, v in header.items() if k != "__metadata__")


def test_an_error_of_another_file_is_its_own(tmp_path: Path) -> None:
    """What is read, such as the model to convert, is not said to be a disk that is full."""
    with pytest.raises(FileNotFoundError) as caught, complete_directory(tmp_path / "target"):
        (tmp_path / "source.json").read_text()
    assert not isinstance(caught.value, DiskError)
    with pytest.raises(DiskError), complete_directory(tmp_path / "target") as partial:
        (partial / "folder" / "file").write_text("")
    assert not any(tmp_path.iterdir())
