"""Every writer, ended at every event of its files: what is there afterwards is the old or the new, whole, and a second
try succeeds and leaves nothing else behind.

    python -m tests.faults.kills [--sample N] [--only NAME] [--folder DIRECTORY]

Prints for each writer how many ends were tried, of each kind (`events.Kind`), and how many failed. Some seconds with a
sample of N events each, as a test of every run; all of them take some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch

from llama4 import Llama4
from llama4.adapters.config import LoraConfig
from llama4.adapters.files import ADAPTER_FILES, save_adapter
from llama4.adapters.lora import Adapter
from llama4.config import Llama4Config, RopeScaling
from llama4.engine.prefix_cache import PromptCache
from llama4.errors import Llama4Error
from llama4.files import replace_text, sync_file
from llama4.train.data import load_dataset
from llama4.train.loop import finetune
from llama4.train.merge import write_merged
from llama4.train.optimizer import AdamW
from llama4.train.prune import prune
from llama4.train.report import is_finished, read_metrics
from llama4.train.state import STATE_FILE, read_about, save_state
from llama4.train.teacher import save_teacher
from llama4.weights import directory as directories
from llama4.weights import hub
from llama4.weights.checkpoint import LAYOUTS, open_checkpoint
from llama4.weights.convert import convert, convert_to_gguf, quantize
from llama4.weights.save import save
from tests import small_model
from tests.faults import events
from tests.faults.events import Kind, Outcome
from tests.faults.tally import Tally

SHARD = 100_000
"""Bytes of a file, so that the small model is in several."""
BROKEN_OFF = "parts of two models"
"""What is said of a directory that could not be replaced in one step."""


@dataclass(frozen=True)
class Writer:
    """One way to write something.

    Attributes:
        name: of it.
        prepare: make what is there before, in a folder that is empty.
        write: write, in such a folder; what it writes is called "target".
        read: -> what "target" holds, as something to compare.
        says: "target" may also be refused with these words.
        again: with these words a second try may be refused, if the first one has written all.
        keeps: what it leaves when it fails is needed by the next try.
    """

    name: str
    prepare: Callable[[Path], object]
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    says: str | None = None
    again: str | None = None
    keeps: bool = False


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_model(folder: Path) -> Any:
    """All tensors by their bits, and all other files by their content, with what is the user's own."""
    target = folder / "target"
    if not target.exists():
        return None
    _, source = open_checkpoint(target)
    tensors = {name: source.read(name).contiguous().view(torch.uint8).numpy().tobytes() for name in source.names()}
    weights = [pattern for layout in LAYOUTS.values() for pattern in layout.weight_files]
    paths = {path.relative_to(target): path for path in target.rglob("*") if path.is_file()}
    files = {name: path for name, path in paths.items() if name.parts[0] != directories.INSIDE}
    beside = {
        str(name): digest(path)
        for name, path in files.items()
        if not any(name.match(pattern) for pattern in (*weights, "*.index.json"))
    }
    return {name: hashlib.sha256(value).hexdigest() for name, value in tensors.items()}, beside


def read_gguf(folder: Path) -> Any:
    """The model with its vision tower, which may be there before it."""
    names = "target.gguf", "mmproj-target.gguf"
    return read_files(*names)(folder) if (folder / names[0]).exists() else None


def read_files(*names: str) -> Callable[[Path], Any]:
    """-> what reads files of a folder that belong together."""

    def read(folder: Path) -> Any:
        return {name: digest(folder / name) for name in names if (folder / name).exists()} or None

    return read


def read_run(folder: Path) -> Any:
    """The adapter that a run came to; and that nothing is missing of what is said of the run."""
    target = folder / "target"
    if (target / STATE_FILE).exists():
        read_about(target)
    elif is_finished(target):
        steps = [line["step"] for line in read_metrics(target) if "loss" in line]
        assert steps == [1, 2, 3], steps
    return read_files(*(f"target/{name}" for name in ADAPTER_FILES))(folder)


def _config() -> Llama4Config:
    """Of few tensors, and with what is fixed in Meta's layout as it is there."""
    config = small_model.config()
    assert config.vision is not None
    scaling = RopeScaling(original_max_position_embeddings=8192)
    derived = dict.fromkeys(("no_rope_layers", "moe_layers", "layer_types"))
    text = dataclasses.replace(config.text, num_hidden_layers=1, rope_scaling=scaling, **derived)  # type: ignore[arg-type]
    vision = dataclasses.replace(config.vision, num_hidden_layers=1, max_tiles=16)
    return dataclasses.replace(config, text=text, vision=vision)


class Models:
    """What is written: small random models, and a checkpoint to make others from."""

    def __init__(self, folder: Path) -> None:
        config = _config()
        with mock.patch.object(small_model, "config", return_value=config):
            self.hf = small_model.write(folder / "hf", seed=0)
        (self.hf / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.5}')
        self.meta = folder / "meta"
        convert(self.hf, self.meta, "meta", ranks=2, progress=False)
        self.old, self.new = (Llama4.from_pretrained(self.hf) for _ in range(2))
        with torch.no_grad():
            for parameter in self.new.model.parameters():
                parameter.add_(1)
        self.old.complete("the cat", max_new_tokens=2)
        self.new.complete("a longer document about a cat", max_new_tokens=2)
        self.adapters = [Adapter.create(self.old.model, LoraConfig(rank=2), seed=seed) for seed in (0, 1)]

    def save(self, llm: Llama4, target: Path, shard: int = SHARD) -> None:
        files = llm.side_files.with_text("NOTICE", str(shard))
        save(llm.model, llm.config, target, tokenizer=llm.tokenizer, side_files=files, max_shard_bytes=shard)

    def save_adapter(self, adapter: Adapter, folder: Path) -> None:
        save_adapter(adapter, self.old.model, folder)

    def save_state(self, adapter: Adapter, folder: Path) -> None:
        save_state(folder, AdamW(dict(adapter.named_parameters())), {"step": 1, "best": None})

    def sharded(self, folder: Path) -> None:
        """An older model in more files, and things of the user's own."""
        self.save(self.old, folder / "target", SHARD // 2)
        (folder / "target/notes.txt").write_text("mine")
        (folder / "target/runs/1").mkdir(parents=True)
        (folder / "target/runs/1/log").write_text("mine, too")


def writers(models: Models) -> Iterator[Writer]:
    def over_itself(folder: Path) -> None:
        llm = Llama4.from_pretrained(folder / "target")  # mapped
        with torch.no_grad():
            for parameter, value in zip(llm.model.parameters(), models.new.model.parameters(), strict=True):
                parameter.copy_(value)
        models.save(llm, folder / "target")

    def in_place(folder: Path) -> None:
        with mock.patch.object(directories, "exchange", side_effect=OSError(38, "Function not implemented")):
            models.save(models.new, folder / "target")

    def inside(folder: Path) -> None:
        with mock.patch.object(os.path, "ismount", lambda path: Path(path).name == "target"):
            models.save(models.new, folder / "target")

    def int8(folder: Path) -> None:
        quantize(models.hf, folder / "target", "int8", max_shard_bytes=SHARD // 2, progress=False)

    def half(folder: Path) -> None:
        count = len(events.run(lambda: int8(folder), folder).events)
        shutil.rmtree(folder / "target")
        events.run(lambda: int8(folder), folder, "kill", count // 2)
        assert list((folder / ".target-partial/content").glob("*.safetensors")), "something is done"

    def push(folder: Path) -> None:
        def upload(directory: Path, *_: Any, **__: Any) -> str:
            shutil.copytree(directory, folder / "sent", dirs_exist_ok=True)
            for path in (folder / "sent").iterdir():
                sync_file(path)  # what the Hub has got is there
            os.replace(folder / "sent", folder / "target")
            return ""

        with mock.patch.object(tempfile, "tempdir", str(folder / "temporary")), mock.patch.object(hub, "push", upload):
            shutil.rmtree(folder / "target", ignore_errors=True)
            models.new.push_to_hub("someone/something")

    def adapter_there(folder: Path) -> None:
        models.save_adapter(models.adapters[0], folder / "target")
        (folder / "target/notes.txt").write_text("mine")

    def to_merge(folder: Path) -> None:
        models.save_adapter(models.adapters[0], folder / "adapter")

    data = models.hf.with_name("data.jsonl")
    data.write_text("".join(f'{{"text": "it is {i}"}}\n' for i in range(4)))

    def train(folder: Path) -> None:
        once: dict[str, Any] = {
            "steps": 3,
            "save_every": 1,
            "batch_tokens": 20,
            "lora": LoraConfig(rank=1),
            "progress": False,
        }
        finetune(models.old, data, folder / "target", resume=True, **once)

    def cache(llm: Llama4) -> PromptCache:
        assert llm.cache is not None
        return llm.cache

    def nothing(folder: Path) -> None:
        pass

    model, there = read_model, "exists already"
    yield Writer("save, nothing there", nothing, lambda f: models.save(models.new, f / "target"), model)
    yield Writer("save over shards", models.sharded, lambda f: models.save(models.new, f / "target"), model)
    yield Writer("save over itself", models.sharded, over_itself, model)
    yield Writer("save, no exchange", models.sharded, in_place, model, BROKEN_OFF)
    yield Writer("save to a mount", models.sharded, inside, model, BROKEN_OFF)
    yield Writer(
        "convert to meta",
        nothing,
        lambda f: convert(models.hf, f / "target", "meta", progress=False),
        model,
        again=there,
    )
    yield Writer(
        "convert to hf", nothing, lambda f: convert(models.meta, f / "target", "hf", progress=False), model, again=there
    )
    yield Writer(
        "convert to GGUF",
        nothing,
        lambda f: convert_to_gguf(models.hf, f / "target.gguf", "q8_0", progress=False),
        read_gguf,
        again=there,
    )
    yield Writer("quantize", nothing, int8, model, again=there, keeps=True)
    yield Writer("quantize, resumed", half, int8, model, again=there, keeps=True)
    yield Writer("push", lambda folder: (folder / "temporary").mkdir(), push, model)
    yield Writer(
        "merge",
        to_merge,
        lambda f: write_merged(models.hf, f / "adapter", f / "target"),
        model,
        again=there,
    )
    yield Writer(
        "adapter",
        adapter_there,
        lambda f: models.save_adapter(models.adapters[1], f / "target"),
        read_files(*(f"target/{name}" for name in (*ADAPTER_FILES, "notes.txt"))),
    )
    yield Writer(
        "state of training",
        lambda f: models.save_state(models.adapters[0], f),
        lambda f: models.save_state(models.adapters[1], f),
        read_files(STATE_FILE),
    )
    yield Writer(
        "prune",
        nothing,
        lambda f: prune(models.hf, f / "target", data, experts=2, progress=False),
        model,
        again=there,
    )
    dataset = load_dataset(data, models.old.processor, max_length=99, progress=False)
    yield Writer(
        "teach",
        lambda f: save_teacher(models.old, dataset, f / "target.safetensors", top=2),
        lambda f: save_teacher(models.new, dataset, f / "target.safetensors", top=3),
        read_files("target.safetensors"),
    )
    yield Writer("finetune", nothing, train, read_run, again="is finished", keeps=True)
    yield Writer(
        "prompt cache",
        lambda folder: cache(models.old).save(folder / "target"),
        lambda folder: cache(models.new).save(folder / "target"),
        read_files("target"),
    )
    yield Writer(
        "text, as of a benchmark",
        lambda folder: replace_text(folder / "target", "old"),
        lambda folder: replace_text(folder / "target", "new" * 10_000),
        read_files("target"),
    )


def names_in(folder: Path) -> list[str]:
    """All names in a folder but for how many shards there are, which does not matter here."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Trial:
    """A writer in a folder of its own."""

    def __init__(self, writer: Writer, folder: Path) -> None:
        self.writer = writer
        self.before, self.folder = folder / "before", folder / "now"
        self.before.mkdir()
        writer.prepare(self.before)
        self.old = self._read(self.before)
        self._begin()
        self.whole = events.run(lambda: writer.write(self.folder), self.folder)
        assert self.whole.error is None, self.whole.error
        self.new, self.names = self._read(self.folder), names_in(self.folder)
        assert self.new != self.old

    def failure(self, kind: Kind, at: int) -> str | None:
        """End the writer at an event; -> what is wrong then."""
        self._begin()
        outcome = events.run(lambda: self.writer.write(self.folder), self.folder, kind, at)
        if kind != "full" and not outcome.killed:
            return None  # it has fewer events this time
        if problem := self._wrong(outcome):
            return problem
        again = events.run(lambda: self.writer.write(self.folder), self.folder)
        may_say = self.writer.again
        if again.error is not None and (may_say is None or may_say not in again.error):
            return f"a second try: {again.error}"
        if self._read(self.folder) != self.new:
            return f"a second try made something else{f', and said {again.error}' if again.error else ''}"
        if names_in(self.folder) != self.names:
            return f"a second try left {sorted(set(names_in(self.folder)) ^ set(self.names))[:4]}"
        return None

    def _wrong(self, outcome: Outcome) -> str | None:
        if outcome.error is not None:  # on a full disk
            name, _, text = outcome.error.partition(": ")
            if name != "DiskError" or "could not write" not in text or "free" not in text:
                return f"the error is {outcome.error}"
            if str(self.folder) not in text:
                return f"no file is named: {text}"
            if self._read(self.folder) not in ((self.old, self.new) if self.writer.keeps else (self.old,)):
                return "it failed, and the old is not there any more"
            if not self.writer.keeps:
                left = set(names_in(self.folder)) - set(names_in(self.before))
                left = {name for name in left if not name.startswith("sent")}  # which stands for the Hub
                if left:
                    return f"it failed and left {sorted(left)[:4]}"
            return None
        found = self._read(self.folder)
        if isinstance(found, Llama4Error):
            return None if self.writer.says and self.writer.says in str(found) else f"not to be read: {found}"
        return None if found in (self.old, self.new) else "neither the old nor the new"

    def _read(self, folder: Path) -> Any:
        """What is there, or why that cannot be told."""
        try:
            return self.writer.read(folder)
        except Llama4Error as error:
            return error

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.before, self.folder)


def both_at_once(models: Models, folder: Path, seed: int) -> str | None:
    """Two processes save to one target, and one of them is killed from outside; -> what is wrong then."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    models.sharded(folder)
    chance = random.Random(seed)
    whole = []
    for llm in (models.old, models.new):
        shutil.rmtree(folder / "other", ignore_errors=True)
        shutil.copytree(folder / "target", folder / "other/target")
        models.save(llm, folder / "other/target")
        whole.append(read_model(folder / "other"))
    whole.append(read_model(folder))
    begin = time.monotonic()
    processes = [_forked(partial(models.save, llm, folder / "target")) for llm in (models.old, models.new)]
    time.sleep(chance.uniform(0, 0.5))
    os.kill(processes[chance.randrange(2)], signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)
    if (found := read_model(folder)) not in whole:
        return "neither of the two nor the old"
    if found == whole[2] and time.monotonic() - begin > 60:
        return "nobody wrote"
    models.save(models.new, folder / "target")
    left = sorted(path.name for path in folder.iterdir())
    return None if left == ["other", "target"] and read_model(folder) == whole[1] else f"a third one left {left}"


def _forked(action: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def run(
    folder: Path, sample: int | None = None, pairs: int = 24, *, only: str = "", part: tuple[int, int] = (0, 1)
) -> Tally:
    """Every writer, ended in every way.

    Args:
        sample: events of each writer, of each kind; None for all.
        pairs: times that two write at once.
        only: writers with this in their names.
        part: (i, n) for the i-th of every n of them.
    """
    tally, chance = Tally(), random.Random(0)
    with mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}):
        models = Models(folder)
        for i, writer in enumerate(writers(models)):
            if only not in writer.name or i % part[1] != part[0]:
                continue
            place = folder / writer.name.replace(" ", "-").replace(",", "")
            place.mkdir()
            trial = Trial(writer, place)
            count = len(trial.whole.events)
            for kind in get_args(Kind):
                numbers: Sequence[int] = range(count)
                if sample is not None and sample < count:
                    numbers = sorted(chance.sample(numbers, sample))
                for at in numbers:
                    tally.note(writer.name, trial.failure(kind, at), f"{kind} at {at} ({trial.whole.events[at]})")
            print(f"{writer.name}: {count} events, {tally.failed[writer.name]} failed", flush=True)
            shutil.rmtree(place)
        if only in "two at once" and part[0] == part[1] - 1:
            for seed in range(pairs):
                tally.note("two at once", both_at_once(models, folder / "both", seed), str(seed))
    return tally


def run_in_parts(folder: Path, sample: int | None = None, jobs: int = 1) -> Tally:
    """As `run`, in so many processes."""
    places = [folder / str(i) for i in range(jobs)]
    for place in places:
        place.mkdir()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _prepare) as pool:
        parts = [pool.submit(run, places[i], sample, part=(i, jobs)) for i in range(jobs)]
        return Tally.of(part.result() for part in parts)


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # what converting says, at each of thousands of tries


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="events of each writer, of each kind")
    parser.add_argument("--only", default="", metavar="NAME", help="writers with this in their names")
    parser.add_argument("--folder", type=Path, metavar="DIRECTORY", help="to work in; by default a temporary one")
    parser.add_argument("--pairs", type=int, default=24, metavar="N", help="times that two write at once")
    options = parser.parse_args(arguments)
    if not events.is_supported():
        print("this needs Linux on x86-64")
        return 0
    _prepare()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        tally = run(Path(name).resolve(), options.sample, options.pairs, only=options.only)
    print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
