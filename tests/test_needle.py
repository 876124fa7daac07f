"""examples/needle.py: hay is what it says, questions are scored rightly, and a run can be stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llama4.model.multimodal import Llama4Model

SCRIPT = Path(__file__).parents[1] / "examples" / "needle.py"
spec = importlib.util.spec_from_file_location("needle", SCRIPT)
assert spec is not None and spec.loader is not None
needle = importlib.util.module_from_spec(spec)
sys.modules["needle"] = needle  # where its dataclasses look for their annotations
spec.loader.exec_module(needle)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def search(ids: list[int], key: int) -> list[int]:
    """Values of the needles with that key, by reading."""
    return [ids[i + 2] for i in range(len(ids) - 2) if ids[i] == needle.MARK and ids[i + 1] == key]


@pytest.mark.parametrize("step", [0, 250, 400, 550, 1100])
def test_a_lesson_has_one_answer_to_every_question(step: int) -> None:
    hay = needle.lesson(step, 1200, 2048, seed=3)
    rows, needles = hay.keys.shape
    assert 1024 < hay.ids.numel() <= 2048
    assert hay.ids.shape[1] <= needle.TRAINED
    for row in range(rows):
        ids = hay.ids[row].tolist()
        assert ids.count(needle.MARK) == ids.count(needle.ASK) == needles
        asked = [i for i, token in enumerate(ids) if token == needle.ASK]
        assert asked == list(range(len(ids) - 3 * needles, len(ids), 3))
        for i, start in zip(asked, hay.starts[row].tolist(), strict=True):
            assert search(ids, ids[i + 1]) == [ids[i + 2]]
            assert ids[start + 1] == ids[i + 1]
        before = torch.arange(hay.ids.shape[1])[hay.answers_at]
        assert before.tolist() == [i + 1 for i in asked]


def test_needles_lie_everywhere_and_never_touch() -> None:
    starts = needle.scattered(2000, 4, 14, torch.Generator().manual_seed(0))
    assert starts.min() == 0 and starts.max() == 14 - 3
    assert starts.diff(dim=1).min() == 3


class Reader:
    """In a model's place: remembers the hay, and answers by searching it, in all of it or chunk by chunk; but for
    needles that begin at `blind`."""

    def __init__(self, blind: range = range(0), chunk: int | None = None) -> None:
        self.chunks: list[list[int]] = []
        self.blind, self.chunk = blind, chunk

    def new_cache(self) -> None:
        return None

    def __call__(self, ids: torch.Tensor, cache: None, last_only: bool = False) -> torch.Tensor:
        logits = torch.zeros(1, ids.shape[1], needle.WORDS + 2)
        logits[..., needle.MARK] = 1.0  # what it says when it does not know: never right
        if last_only:
            hay = [0 if at in self.blind else token for at, token in enumerate(ids[0].tolist())]
            size = self.chunk or len(hay)
            self.chunks = [hay[at : at + size] for at in range(0, len(hay), size)]
            return logits[:, -1:]
        for i, token in enumerate(ids[0].tolist()):
            for value in (value for chunk in self.chunks for value in search(chunk, token)):
                logits[0, i, value] = 100.0
        return logits


def test_what_can_be_found_counts_at_its_depth() -> None:
    length = 4096
    whole = needle.ask(Reader(), length, seed=0)
    assert [sum(n["depth"] == d for n in whole) for d in range(11)] == [needle.PER_DEPTH] * 11
    assert all(n["hit"] == 1.0 and n["logprob"] == pytest.approx(0.0) for n in whole)
    for row, begin in ((0, 0), (5, 1983), (10, 3966)):  # of 4030 tokens without questions, 64 at each depth
        missed = [n for n in needle.ask(Reader(range(begin, begin + 64)), length, seed=0) if not n["hit"]]
        assert [n["depth"] for n in missed] == [row] * needle.PER_DEPTH


def test_needles_cut_by_a_chunk_border_are_known() -> None:
    needles = [n for seed in range(40) for n in needle.ask(Reader(chunk=needle.CHUNK), 512, seed)]
    assert [n["hit"] for n in needles] == [1.0 - n["cut"] for n in needles]
    assert any(n["cut"] for n in needles)


def test_the_cache_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Llama4Model(needle.model_config(needle.DESIGNS["whole"]))
    model.init_weights()
    seen: list[torch.Tensor] = []

    def uncached(ids: torch.Tensor, cache: object, last_only: bool = False) -> torch.Tensor:
        seen.append(ids)
        return model(torch.cat(seen, dim=1))[:, -ids.shape[1] :]

    alone = needle.ask(uncached, 512, seed=0, new_cache=lambda: None)
    for a, b in zip(needle.ask(model, 512, seed=0), alone, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_designs_lack_what_they_say() -> None:
    def layers(name: str) -> list[tuple[bool, int | None]]:
        text = needle.model_config(needle.DESIGNS[name]).text
        return [(text.uses_rope(i), text.window(i)) for i in range(4)]

    rope, nope, full = (True, needle.CHUNK), (False, None), (True, None)
    assert layers("whole") == layers("no-temperature") == layers("late-temperature") == [rope] * 3 + [nope]
    assert layers("no-chunks") == [full] * 3 + [nope]
    assert layers("no-nope") == [rope] * 4
    assert layers("neither") == [full] * 4
    tuned = {n for n, d in needle.DESIGNS.items() if needle.model_config(d).text.attn_temperature_tuning}
    assert tuned == set(needle.DESIGNS) - {"no-temperature"}


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    def learner() -> Any:
        return needle.Learner(needle.model_config(needle.DESIGNS["whole"]), 3e-3, seed=0)

    def learn(learner: Any, steps: range) -> list[float]:
        return [learner.learn(needle.lesson(step, 6, 256, 0), 0.1 + step)[0] for step in steps]

    through, first, second = learner(), learner(), learner()
    losses = learn(through, range(6))
    learn(first, range(3))
    first.save(needle.checkpoint("whole", tmp_path), 3)
    assert second.load(needle.checkpoint("whole", tmp_path)) == 3
    read = needle.load("whole", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), first.model.parameters(), strict=True))
    assert learn(second, range(3, 6)) == losses[3:]


def test_the_script_makes_checkpoints_measurements_and_the_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--steps", "2", "--tokens", "128", "--lengths", "256", "512"]
    monkeypatch.setattr(needle, "samples", lambda length: 1)
    monkeypatch.setattr("sys.argv", ["needle", *arguments, "--designs", "no-temperature", "late-temperature"])
    needle.main()
    *rows, last = capsys.readouterr().out.splitlines()
    assert rows[0] == "| design | 256 | 512 | cut by a border |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| no temperature", "| temperature, untrained"]
    assert last == str(tmp_path / "needle.png")
    names = {"no-temperature.safetensors", "no-temperature.json", "no-temperature.log", "late-temperature.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"needle.png"}
    found = json.loads((tmp_path / "no-temperature.json").read_text())
    assert {length: len(haystacks) for length, haystacks in found.items()} == {"256": 1, "512": 1}
    with Image.open(tmp_path / "needle.png") as picture:
        assert picture.width < 2000

    def never(*_: object) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(needle, "ask", never)
    monkeypatch.setattr(needle.Learner, "learn", never)
    needle.main()


def test_a_panel_shows_recall_by_depth_and_length() -> None:
    haystack = [{"depth": float(d), "hit": float(d < 4), "logprob": 0.0, "cut": 0.0} for d in range(11)]
    panel = needle.draw_panel("title", {"512": [haystack]})
    x = needle.LEFT + needle.CELL_WIDTH // 2
    seen = [panel.getpixel((x, needle.TOP + needle.CELL_HEIGHT * d + 4)) for d in range(11)]
    assert seen == [needle.colour(1.0)] * 4 + [needle.colour(0.0)] * 7
