"""Progress bars on a real terminal, in a pipe, and in a notebook: they move within one long step, and end at 100%."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4 import files, progress
from llama4.adapters.config import LoraConfig
from llama4.adapters.lora import Adapter
from llama4.adapters.merge import merge_adapter
from llama4.api import Llama4
from llama4.engine.prefill import prefill
from llama4.engine.prefix_cache import PromptCache
from llama4.inputs import Inputs
from llama4.model.multimodal import Llama4Model
from llama4.progress import Bar, track
from llama4.quantization import weight
from llama4.train import finetune
from llama4.weights import memory
from llama4.weights.convert import convert, convert_to_gguf, quantize
from llama4.weights.load import load
from llama4.weights.meta.write import write_ranks
from llama4.weights.model_source import ModelSource
from llama4.weights.save import save
from tests import small_model

PIECE = 256
"""Bytes, where 16 MiB are usual: even these tensors have many."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar is drawn at once, and whenever it moves."""
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "INTERVAL", 0)
    monkeypatch.setattr(files, "PIECE", PIECE)
    monkeypatch.setattr(memory, "_PIECE_NUMBERS", PIECE // 2)
    monkeypatch.setattr(weight, "MAX_QUANTIZED_AT_ONCE", PIECE)
    monkeypatch.setattr("llama4.engine.prefix_cache.PIECE", PIECE)


class Terminal:
    """A pseudo-terminal in place of stderr; `text` is what was written to it."""

    def __init__(self, rows: int = 24, columns: int = 100) -> None:
        self._size = rows, columns

    def __enter__(self) -> Terminal:
        import pty
        import termios

        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, self._size)
        self.text, self._seen, self._before = "", b"", sys.stderr
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        sys.stderr = os.fdopen(theirs, "w")
        return self

    def _read(self) -> None:
        try:
            while data := os.read(self._ours, 65536):
                self._seen += data
        except OSError:  # the other side is closed
            self.text = self._seen.decode()

    def wait(self, is_seen: Callable[[bytes], object]) -> None:
        """Until what was written is so, or a minute is over."""
        end = time.monotonic() + 60
        while time.monotonic() < end and not is_seen(self._seen):
            time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        sys.stderr.close()
        sys.stderr = self._before
        self._thread.join()
        os.close(self._ours)


@pytest.fixture(scope="module")
def llm() -> Llama4:
    return Llama4(small_model.model(), None, progress=True)


@pytest.fixture
def plain(llm: Llama4, tmp_path: Path) -> Path:
    save(llm.model, llm.config, tmp_path / "plain")
    return tmp_path / "plain"


def percentages(text: str, doing: str) -> list[int]:
    return [int(percent) for percent in re.findall(rf"{doing}: +(\d+)%", text)]


def loading(llm: Llama4, plain: Path) -> None:
    with torch.device("meta"):
        model = Llama4Model(llm.config)
    load(model, ModelSource(llm.model), memory_map=False, progress=True)


def reading(llm: Llama4, plain: Path) -> None:
    ids = torch.arange(100)[None]
    prefill(llm.model, Inputs(ids, torch.ones_like(ids), None), llm.model.new_cache(1), progress=True)


def looking(llm: Llama4, plain: Path) -> None:
    ids = torch.tensor([[5, llm.config.image_token_index, 6]])
    pixels = torch.zeros(1, 3, 28, 28)
    prefill(llm.model, Inputs(ids, torch.ones_like(ids), pixels), llm.model.new_cache(1), progress=True)


def saving_a_cache(llm: Llama4, plain: Path) -> None:
    ids = torch.arange(100)[None]
    prefill(llm.model, Inputs(ids, torch.ones_like(ids), None), cache := llm.model.new_cache(1))
    PromptCache(llm.model, cache, ids[0], progress=True).save(plain.parent / "cache")


def converting(llm: Llama4, plain: Path) -> None:
    write_ranks(ModelSource(llm.model), llm.config, plain, 2, progress=True)


def whole(plain: Path) -> Path:
    """A directory with a tokenizer."""
    return small_model.write(plain.parent / "whole")


def training(plain: Path) -> None:
    (plain.parent / "data.jsonl").write_text('{"prompt": "say", "completion": "it is what it is"}\n')
    finetune(whole(plain), plain.parent / "data.jsonl", plain.parent / "adapter", steps=5, lora=LoraConfig(rank=2))


def merging(llm: Llama4, plain: Path) -> None:
    model = small_model.model()
    merge_adapter(Adapter.create(model, LoraConfig(rank=2)), model, progress=True)


def writing_gguf(llm: Llama4, plain: Path) -> None:
    convert_to_gguf(whole(plain), plain.parent / "a.gguf", "f32")


def loading_gguf(llm: Llama4, plain: Path) -> None:
    writing_gguf(llm, plain)
    Llama4.from_pretrained(plain.parent / "a.gguf")


WAITS: dict[str, tuple[str, int, Callable[[Llama4, Path], Any]]] = {
    "loading": ("loading", 50, loading),
    "quantizing while loading": (
        "loading",
        50,
        lambda llm, plain: Llama4.from_pretrained(plain, quantization="int8"),
    ),
    "saving": ("writing", 50, lambda llm, plain: save(llm.model, llm.config, plain.parent / "a", progress=True)),
    "quantizing a checkpoint": ("writing", 50, lambda llm, plain: quantize(plain, plain.parent / "b", "int8")),
    "converting": (
        "reading and writing",
        50,
        lambda llm, plain: write_ranks(ModelSource(llm.model), llm.config, plain, 2, progress=True),
    ),
    "verification": ("checking", 50, lambda llm, plain: convert(plain, plain.parent / "c", "hf")),
    "a prompt": ("reading", 4, reading),
    "pictures": ("looking at pictures", 2, looking),
    "hashing weights": ("hashing weights", 50, saving_a_cache),
    "loading GGUF": ("loading", 20, loading_gguf),
    "merging": ("merging", 10, merging),
    "a cache": ("saving", 20, saving_a_cache),
}
"""What may take long -> what its bar says, at how many places it must be seen, and how to begin it. A prompt here is a
single piece, which moves by layers."""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("wait", WAITS)
def test_it_moves_on_a_terminal(llm: Llama4, plain: Path, wait: str) -> None:
    doing, places, run = WAITS[wait]
    with Terminal() as terminal:
        run(llm, plain)
    seen = percentages(terminal.text, doing)
    assert seen == sorted(seen)
    assert len(set(seen)) >= places
    assert seen[-1] == 100


@pytest.mark.parametrize("wait", WAITS)
def test_it_is_quiet_in_a_pipe(llm: Llama4, plain: Path, wait: str, capfd: pytest.CaptureFixture[str]) -> None:
    WAITS[wait][2](llm, plain)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_no_progress_is_silence(plain: Path) -> None:
    """Of bars inside, too: compiling kernels knows nothing of the argument."""
    ids = torch.arange(100)[None]
    inputs = Inputs(ids, torch.ones_like(ids), None)
    with Terminal() as terminal:
        llm = Llama4.from_pretrained(plain, quantization="int8", progress=False)
        prefill(llm.model, inputs, cache := llm.model.new_cache(1), progress=False)
        PromptCache(llm.model, cache, ids[0], progress=False).save(plain.parent / "cache")
        with Bar("hidden", 2, "steps", shown=False), Bar("inside", 2, "steps"):
            pass
    assert terminal.text == ""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_one_tensor_moves_a_bar(tmp_path: Path) -> None:
    """Bytes, the rate and the time that is left, within a single step."""
    size = 64 * PIECE
    with Terminal() as terminal, (tmp_path / "file").open("wb") as file:  # noqa: SIM117
        with Bar("writing", size, "bytes") as bar, bar.step(size):
            files.write_pieces(file, memoryview(bytes(size)))
    text = terminal.text
    assert len(set(percentages(text, "writing"))) > 60
    assert re.search(r"8\.00k/16\.0k \[[\d:]+<[\d:]+, [\d.]+[kMG]?B/s\]", text)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("rows", "columns"), [(24, 100), (0, 100), (24, 0), (0, 0)])
def test_time_moves_within_a_step_without_parts(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Also on a terminal without a size, as a container may have it."""
    monkeypatch.setattr(progress, "DELAY", 0.05)
    monkeypatch.setattr(progress, "TICK", 0.05)
    with Terminal(rows, columns) as terminal, Bar("computing", 2, "steps") as bar, bar.step(2):
        terminal.wait(lambda seen: seen.count(b"computing:   0%") > 5 and re.search(rb"\[00:0[1-9]<", seen))
    text = terminal.text
    assert text.count("computing:   0%") > 5
    assert re.search(r"\[00:0[1-9]<", text)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_what_is_done_soon_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 10)
    with Terminal() as terminal, Bar("computing", 2, "steps") as bar:
        for _ in range(2):
            with bar.step(1):
                pass
    assert terminal.text == ""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_parts_have_parts() -> None:
    with Terminal() as terminal, Bar("computing", 4, "steps") as bar:
        for _ in range(2):
            with bar.step(2):
                for _ in track(range(2)):
                    for _ in track(range(5)):
                        pass
                list(track(range(3)))  # the same tensor again: the bar does not go back
    assert sorted(set(percentages(terminal.text, "computing"))) == list(range(0, 101, 5))


def notebook(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What a kernel of Jupyter has: a shell with a kernel, and widgets, whose values are noted."""
    import tqdm.auto
    import tqdm.notebook

    values: list[tuple[str, float]] = []

    class Widget:
        def __init__(self, children: Any = (), **settings: Any) -> None:
            self.children, self.layout, self.style = children, types.SimpleNamespace(), types.SimpleNamespace()
            self.bar_style = self.value = ""
            self.__dict__.update(settings)

        def close(self) -> None:
            values.append(("closed", 0))

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)
            if name == "value" and isinstance(value, float):
                values.append(("at", value))

    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    for name in ("HTML", "IProgress", "TqdmHBox"):
        monkeypatch.setattr(tqdm.notebook, name, Widget, raising=False)
    monkeypatch.setattr(tqdm.notebook, "display", lambda container: values.append(("shown", 0)), raising=False)
    monkeypatch.setattr(tqdm.auto, "tqdm", tqdm.notebook.tqdm)
    return values


def test_a_notebook_has_a_widget(
    llm: Llama4, plain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values = notebook(monkeypatch)
    loading(llm, plain)
    places = [value for what, value in values if what == "at"]
    assert [what for what, _ in values if what != "at"] == ["shown", "closed"]
    assert len(set(places)) > 50
    assert places[-1] == sum(parameter.nbytes for parameter in llm.model.parameters())
    assert capfd.readouterr().err == ""


def test_a_notebook_without_widgets_has_text(
    llm: Llama4, plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    loading(llm, plain)
    assert percentages(capsys.readouterr().err, "loading")[-1] == 100


def test_ipython_in_a_pipe_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not progress.in_notebook()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_writing_gguf_moves(llm: Llama4, plain: Path) -> None:
    """Two files, and a bar of each: the vision tower, then the model."""
    with Terminal() as terminal:
        writing_gguf(llm, plain)
    seen = percentages(terminal.text, "writing")
    (second,) = [i for i in range(1, len(seen)) if seen[i] < seen[i - 1]]
    for of_file in (seen[:second], seen[second:]):
        assert of_file[-1] == 100 and len(set(of_file)) > 10


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_training_shows_its_loss(plain: Path) -> None:
    with Terminal() as terminal:
        training(plain)
    assert re.search(r"training, loss \d\.\d{3}, \d+ tokens/s: +80%.* 4\.00/5\.00 \[[\d:]+<[\d:]+, ", terminal.text)


def test_a_log_of_training_shows_its_loss(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 3600)
    training(plain)
    assert capfd.readouterr().err == "", "that took no hour"
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    with Bar("computing", 240, "steps", logged=True) as bar:
        monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 60)
        with bar.step(40):
            pass
        bar.describe("computing, loss 2.5")
    assert capfd.readouterr().err == "llama4: computing, loss 2.5, 40 of 240 steps, 5 min left\n"
    monkeypatch.undo()


def test_importing_is_light() -> None:
    code = "import sys, llama4.progress, llama4.cli.main; sys.exit('tqdm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


STARTING = """
import os, sys
from llama4.cli.main import main
from llama4.progress import Bar

def enter(bar):
    print(bar._settings["desc"], "torch" in sys.modules, flush=True)
    os._exit(7)

Bar.__enter__ = enter
main(sys.argv[1:])
"""


def test_a_bar_may_be_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what it is around has done anything."""
    monkeypatch.setattr(progress, "DELAY", 100)
    with Terminal() as terminal, Bar("starting", at_once=True):
        terminal.wait(lambda seen: b"starting: 00:00" in seen)
    assert "starting: 00:00" in terminal.text


@pytest.mark.parametrize(
    "command",
    [
        "generate hi",
        "chat",
        "serve tiny",
        "info tiny",
        "info --system",
        "plan scout",
        "moderate tiny hi",
        "finetune tiny --data none.jsonl --output none",
        "teach tiny --data none.jsonl --output none.safetensors",
        "prune tiny none --data none.jsonl --layers 1",
        "convert tiny none --to hf",
        "merge tiny none none",
        "quantize tiny none --scheme int4",
        "bench generate tiny",
    ],
)
def test_a_command_says_that_it_starts(command: str) -> None:
    """The first bar is that of the imports, and before it nothing has taken long."""
    done = subprocess.run(
        [sys.executable, "-c", STARTING, *command.split()], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (7, "starting False\n")


@pytest.mark.parametrize("ends_whole", [True, False])
def test_what_is_left_before_its_end_is_not_drawn_as_done(ends_whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "has_display", lambda: True)
    with Bar("training", 10, "steps") as bar:
        bar.advance(3)
        bar.ends_whole, drawn = ends_whole, bar._bar
    assert drawn.n == (10 if ends_whole else 3)
