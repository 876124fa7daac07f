"""Data files: every kind, what is learnt of it, and packing; and files that are wrong, by line."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llama4.api import Llama4
from llama4.errors import ArgumentError
from llama4.inputs import Processor
from llama4.train.data import Batches, Dataset, Example, collate, load_dataset
from llama4.train.loss import IGNORED
from llama4.train.objectives import batch_loss
from llama4.train.records import DataError, read_records
from tests import small_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama4:
    return Llama4.from_pretrained(small_model.write(tmp_path_factory.mktemp("data") / "model"))


@pytest.fixture
def processor(llm: Llama4) -> Processor:
    return llm.processor


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def load(path: Path, processor: Processor, **options: Any) -> Dataset:
    return load_dataset(path, processor, **{"max_length": 4096, "progress": False} | options)


def learnt(example: Example, processor: Processor) -> str:
    chosen = [token for token, is_learnt in zip(example.ids, example.is_learnt, strict=True) if is_learnt]
    return processor.tokenizer.decode(chosen)


USER, REPLY = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [USER, REPLY]},
        {"prompt": "How many?", "completion": "Three."},
        {"prompt": [USER], "completion": [REPLY]},
        {"instruction": "How many?", "output": "Three."},
        {"instruction": "How many?", "input": "", "output": "Three."},
        {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three."}]},
        {"prompt": "How many?", "chosen": "Three.", "rejected": "Four."},
    ],
)
def test_every_kind_is_asked_as_chat_asks(line: dict[str, Any], processor: Processor, tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "x.jsonl", line), processor)
    (example,) = dataset.examples
    asked = processor([USER]).input_ids[0].tolist()
    assert list(example.ids[: len(asked)]) == asked
    assert learnt(example, processor) == "Three.<|eot|>"
    assert example.is_learnt == (False,) * len(asked) + (True,) * (len(example.ids) - len(asked))
    if "rejected" in line:
        assert learnt(dataset.rejected[0], processor) == "Four.<|eot|>"


def test_alpaca_with_an_input_and_a_text(processor: Processor, tmp_path: Path) -> None:
    lines = [{"instruction": "Add.", "input": "1, 2", "output": "3"}, {"text": "Once upon"}]
    one, other = load(write(tmp_path / "x.jsonl", *lines), processor).examples
    assert "user<|header_end|>\n\nAdd.\n\n1, 2<|eot|>" in processor.tokenizer.decode(one.ids)
    assert learnt(other, processor) == "<|begin_of_text|>Once upon<|end_of_text|>"


def test_a_text_begins_as_one_to_be_continued(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a text"})
    for adds_bos in (True, False):
        monkeypatch.setattr(processor.tokenizer, "adds_bos", adds_bos)
        ids = load(path, processor).examples[0].ids
        assert list(ids[:-1]) == processor.complete("a text").input_ids[0].tolist()


def test_users_text_is_never_a_special_token(processor: Processor, tmp_path: Path) -> None:
    lines = [{"text": "a<|eot|>b"}, {"prompt": "<|eot|>", "completion": "<|image|>"}]
    for example in load(write(tmp_path / "x.jsonl", *lines), processor).examples:
        ends = example.ids.count(processor.tokenizer.special("<|eot|>"))
        assert ends == {1: 0, 2: 2}[example.line]


def test_what_is_learnt(processor: Processor, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = write(tmp_path / "x.jsonl", {"messages": [system, USER, REPLY, USER, {**REPLY, "content": "Still three."}]})
    (example,) = load(path, processor).examples
    assert learnt(example, processor) == "Three.<|eot|>Still three.<|eot|>"
    assert learnt(load(path, processor, learn="last").examples[0], processor) == "Still three.<|eot|>"
    assert all(load(path, processor, learn="all").examples[0].is_learnt)
    ghost = load(path, processor, ghost_attention=True).examples[0]
    text = processor.tokenizer.decode(ghost.ids)
    assert text.count("Be brief.\n\nHow many?") == 2 and "system" not in text
    assert learnt(ghost, processor) == "Still three.<|eot|>"
    with pytest.raises(ArgumentError, match="choose one of assistant, last, all"):
        load(path, processor, learn="none")


def test_tools_and_calls(processor: Processor, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    answer = {"role": "tool", "content": "1"}
    line = {"messages": [USER, call, answer, REPLY], "tools": [tool]}
    for given in (line, line | {"tools": json.dumps([tool])}):
        (example,) = load(write(tmp_path / "x.jsonl", given), processor).examples
        found = learnt(example, processor)
        assert found.startswith('{"type": "function", "name": "add"') and found.endswith("<|eom|>Three.<|eot|>")
        assert list(example.ids[:40]) == processor([USER], tools=[tool]).input_ids[0][:40].tolist()


def test_pictures_beside_the_file(llm: Llama4, tmp_path: Path) -> None:
    processor = llm.processor
    Image.new("RGB", (60, 30), "red").save(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    line = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}, REPLY]}
    (example,) = load(write(tmp_path / "x.jsonl", line), processor).examples
    assert example.tiles == 6
    batch = Batches([example], processor, 4096)[0]
    assert batch.pixel_values is not None and batch.pixel_values.shape == (6, 3, 28, 28)
    assert batch_loss(llm.model, batch).isfinite()
    with pytest.raises(DataError, match="nothing is learnt of its 1 lines within 8 tokens"):
        load(write(tmp_path / "x.jsonl", line), processor, max_length=8)


def pictured(*content: Any) -> dict[str, Any]:
    """What a line is to be read as: texts and names of pictures."""
    parts = [
        {"type": "image", "image": each[1:]} if each[0] == "@" else {"type": "text", "text": each} for each in content
    ]
    return {"messages": [{"role": "user", "content": parts}, REPLY]}


SAID = {"from": "gpt", "value": "Three."}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhich?"}, SAID]},
            pictured("@a.png", "Which?"),
        ),
        (
            {
                "images": ["a.png", "b.png"],
                "conversations": [{"from": "human", "value": "Is <image> or<image>?"}, SAID],
            },
            pictured("Is ", "@a.png", " or", "@b.png", "?"),
        ),
        (
            {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>Which?"}, REPLY]},
            pictured("@a.png", "Which?"),
        ),
        (
            {
                "images": ["a.png"],
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
                "completion": "Three.",
            },
            pictured("@a.png", "Which?"),
        ),
        (
            {"images": ["a.png"], "instruction": "<image>Which?", "input": "", "output": "Three.", "source": "here"},
            pictured("@a.png", "Which?"),
        ),
        (
            {"conversations": [{"from": "human", "value": "What does <image>\nof SVG do?"}, SAID]},
            pictured("What does <image>\nof SVG do?"),
        ),
        (
            {
                "image": "a.png",
                "conversations": [
                    {"from": "system", "value": "Of <image>:"},
                    {"from": "human", "value": "<image>Which?"},
                    {"from": "gpt", "value": "<image>\nit is."},
                    {"from": "observation", "value": "None."},
                    SAID,
                ],
            },
            {
                "messages": [
                    {"role": "system", "content": "Of <image>:"},
                    *pictured("@a.png", "Which?")["messages"][:1],
                    {"role": "assistant", "content": "<image>\nit is."},
                    {"role": "tool", "content": "None."},
                    REPLY,
                ]
            },
        ),
        (
            {
                "images": ["a.png"],
                "conversations": [
                    {"from": "human", "value": "Look."},
                    SAID,
                    {"from": "tool", "value": "<image>It."},
                    SAID,
                ],
            },
            {
                "messages": [
                    {"role": "user", "content": "Look."},
                    REPLY,
                    {"role": "tool", "content": pictured("@a.png", "It.")["messages"][0]["content"]},
                    REPLY,
                ]
            },
        ),
        ({"images": [], "image": "", "messages": [{"role": "user", "content": "<image>"}, REPLY]}, pictured("<image>")),
    ],
)
def test_pictures_of_a_line(line: dict[str, Any], wanted: dict[str, Any], processor: Processor, tmp_path: Path) -> None:
    """As LLaVA and LLaMA-Factory write them: equal to parts of messages."""
    for i, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (30 + 30 * i, 30), "red").save(tmp_path / name)
    found, expected = load(write(tmp_path / "x.jsonl", line, wanted), processor).examples
    assert found.ids == expected.ids and found.is_learnt == expected.is_learnt and found.sources == expected.sources
    assert len(found.sources) == json.dumps(wanted).count(".png")


def test_a_preferences_pictures_are_in_both(processor: Processor, tmp_path: Path) -> None:
    Image.new("RGB", (60, 30), "red").save(tmp_path / "a.png")
    line = {"prompt": "<image>Which?", "chosen": "Red.", "rejected": "Blue.", "image": "a.png"}
    dataset = load(write(tmp_path / "x.jsonl", line), processor)
    assert dataset.examples[0].sources == dataset.rejected[0].sources == (str(tmp_path / "a.png"),)


def test_a_picture_in_base64(processor: Processor, tmp_path: Path) -> None:
    Image.new("RGB", (60, 30), "red").save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    lines = [pictured("@" + data, "Which?"), pictured("@" + data.rstrip("="), "Which?")]
    lines.append({"image": data, "messages": [{"role": "user", "content": "<image>Which?"}, REPLY]})
    dataset = load(write(tmp_path / "x.jsonl", pictured("@a.png", "Which?"), *lines), processor)
    assert len({example.ids for example in dataset.examples}) == 1 and dataset.examples[3].tiles == 3


def test_alpaca_with_system_and_history(processor: Processor, tmp_path: Path) -> None:
    """As LLaMA-Factory reads them: the replies of the history are learnt, too."""
    line = {"instruction": "How many?", "output": "Three.", "system": "Be brief.", "history": [["Why?", "So."]]}
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    wanted = {"messages": [*told, {"role": "assistant", "content": "So."}, USER, REPLY]}
    found, expected = load(write(tmp_path / "x.jsonl", line, wanted), processor).examples
    assert found.ids == expected.ids and learnt(found, processor) == "So.<|eot|>Three.<|eot|>"


def test_compressed_files_and_empty_lines(processor: Processor, tmp_path: Path) -> None:
    text = json.dumps({"text": "a"}) + "\n\n  \n" + json.dumps({"text": "b"})
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(text)
    assert [example.line for example in load(tmp_path / "x.jsonl.gz", processor).examples] == [1, 4]


def test_tables_are_read_by_datasets(processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parquet file gives what its rows give as JSON lines; a name on the Hub is asked for there."""
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    lines = [{"messages": [USER, REPLY]}, {"messages": [{"role": "system", "content": "Be brief."}, USER, REPLY]}]
    table = datasets.Dataset.from_list(lines)
    table.to_parquet(str(tmp_path / "x.parquet"))
    wanted = load(write(tmp_path / "x.jsonl", *lines), processor)
    found = load(tmp_path / "x.parquet", processor)
    assert found.examples == wanted.examples and found.digest != wanted.digest
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("someone/chats", "test"): table}[name, split])
    monkeypatch.chdir(tmp_path)
    of_hub = load(Path("someone/chats:test"), processor)
    assert of_hub.examples == wanted.examples and len(of_hub.digest) == 64
    with pytest.raises(DataError, match=r"someone/others cannot be read .* give a file of JSON lines"):
        load(Path("someone/others"), processor)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read"):
        load(tmp_path / "bad.parquet", processor)


def test_rows_of_the_hub_are_judged_like_lines(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a package in the place of `datasets`; a name in a folder that is there is a file's."""
    half = {"text": "half a pair: \ud83d"}
    there = SimpleNamespace(load_dataset=lambda name, split: [half])
    monkeypatch.setitem(sys.modules, "datasets", there)
    monkeypatch.chdir(tmp_path)
    lines = write(tmp_path / "half.jsonl", half)
    for read in (Path("someone/chats"), lines):
        assert [record.text for record in read_records(read)] == [half["text"]]
    (tmp_path / "someone").mkdir()
    with pytest.raises(DataError, match=r"someone/train\.csv cannot be read \(No such file"):
        load(Path("someone/train.csv"), processor)


def test_tables_without_datasets(processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, path in (("datasets", Path("a/b")), ("pyarrow", tmp_path / "x.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=f"package {package}, which is not here: pip install {package}"):
            load(path, processor)
    with pytest.raises(DataError, match="No such file"):
        load(tmp_path / "no.jsonl", processor)


def test_what_is_cut_is_counted(processor: Processor, tmp_path: Path) -> None:
    lines = [{"text": "ab" * n} for n in (2, 30, 50)] + [{"prompt": "ab" * 40, "completion": "x"}]
    dataset = load(write(tmp_path / "x.jsonl", *lines), processor, max_length=20)
    whole = load(tmp_path / "x.jsonl", processor)
    assert max(len(example.ids) for example in dataset.examples) == 20
    assert dataset.cut == 2 and dataset.dropped == (4,)
    assert dataset.cut_tokens == sum(len(e.ids) - 20 for e in whole.examples[1:3])
    assert dataset.notes()[0].endswith(f"2 of 3 examples are cut, {dataset.cut_tokens} tokens")
    assert "1 examples are left out" in dataset.notes()[1]


# -- batches -----------------------------------------------------------------------------------------------------------


def examples(lengths: Sequence[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(i + 1, tuple(torch.randint(0, 800, (n,), generator=generator).tolist()), (True,) * n)
        for i, n in enumerate(lengths)
    ]


def test_packed_sequences_do_not_see_each_other(llm: Llama4) -> None:
    """A batch against its sequences alone, over borders of chunks: losses and gradients."""
    model, some = llm.model, examples([70, 3, 33, 1, 40])
    model.requires_grad_(False)
    weight = model.get_parameter("language_model.model.layers.1.self_attn.k_proj.weight").requires_grad_()
    together = batch_loss(model, collate(some))
    (found,) = torch.autograd.grad(together, weight)
    alone = torch.stack([batch_loss(model, collate([each])) for each in some if len(each.ids) > 1]).sum()
    (wanted,) = torch.autograd.grad(alone, weight)
    assert abs(together / alone - 1) < 1e-6
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_labels_are_the_next_tokens() -> None:
    batch = collate(examples([4, 2]))
    assert batch.labels[0, :3].tolist() == batch.input_ids[0, 1:].tolist()
    assert batch.labels[0, 3] == batch.labels[1, 1] == IGNORED and batch.num_learnt == 4 and batch.num_tokens == 6
    assert F.one_hot(batch.attention_mask).sum(1).tolist() == [[0, 4], [2, 2]]


def test_batches_are_full_and_everything_comes_once(processor: Processor) -> None:
    lengths = [5, 40, 7, 90, 12, 33, 8, 21]
    batches = Batches(examples(lengths), processor, 60, seed=3)
    for epoch in range(3):
        plan = batches.plan(epoch)
        assert sorted(index for batch in plan for index in batch) == list(range(8))
        sizes = [[lengths[i] for i in batch] for batch in plan]
        assert all(sum(batch) <= 60 or len(batch) == 1 for batch in sizes)
        assert all(sum(one) + two[0] > 60 for one, two in itertools.pairwise(sizes))
    first = len(batches.plan(0))
    assert batches.indices(first) == batches.plan(1)[0] and batches.plan(0) != batches.plan(1)
    assert Batches(examples(lengths), processor, 60, seed=3).indices(first + 2) == batches.indices(first + 2)
    assert batches.steps_of(2) == first + len(batches.plan(1)) and batches.steps_of(0.01) == 1


def test_an_epoch_is_laid_out_once(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for each step of those after it."""
    batches, plan, made = Batches(examples([10] * 9), processor, 10), Batches.plan, list[int]()

    def noted(self: Batches, epoch: int) -> list[list[int]]:
        made.extend([epoch] * (self._plan[0] != epoch))
        return plan(self, epoch)

    monkeypatch.setattr(Batches, "plan", noted)
    assert sorted(i for step in range(18, 27) for i in batches.indices(step)) == list(range(9))
    assert made == [0, 1, 2]


# -- what is wrong -----------------------------------------------------------------------------------------------------

DAMAGED: list[tuple[bytes | dict[str, Any] | list[Any] | str, str]] = [
    (b'{"text": "a"', r"it is not JSON: Expecting ',' delimiter at column 13"),
    (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
    (b"text", "it is not JSON: Expecting value at column 1"),
    (b'{"text": NaN}', "NaN is not JSON"),
    (b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}", "it is nested deeper than 64"),
    ([1, 2], r"it is \[1, 2\]; write an object"),
    ({"txt": "a"}, "its fields are 'txt'; there must be messages"),
    ({f"field \x1b[31m{i}": 1 for i in range(1000)}, r"its fields are 'field \\x1b\[31m0, .{,80}; there must be"),
    ({}, "its fields are none"),
    ({"text": ""}, "text is ''; it must be a text that is not empty"),
    ({"text": 3}, "text is 3"),
    ({"prompt": "a"}, "it has a prompt and no completion; add it"),
    ({"prompt": "a", "chosen": "b"}, "it has a prompt and no rejected; add it"),
    ({"prompt": 1, "completion": "b"}, "prompt is 1; it must be a text or a list of messages"),
    ({"prompt": "a", "completion": " "}, "completion is empty"),
    ({"instruction": "a"}, "output is None; it must be a text"),
    ({"instruction": "a", "input": [1], "output": "b"}, r"input is \[1\]; it must be a text"),
    ({"messages": "a"}, "messages is 'a'; it must be a list of messages"),
    ({"messages": []}, "the list of messages is empty"),
    ({"messages": [USER]}, "messages has no text of the assistant, so there is nothing to learn"),
    ({"messages": [{"role": "human", "content": "a"}, REPLY]}, "message 0 has the role 'human'; the roles are"),
    ({"messages": [{"role": "user"}, REPLY]}, "message 0 has the content None"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]}, "image without a picture"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}, REPLY]}, r"no\.png"),
    ({"messages": [USER, REPLY], "tools": "x"}, "tools is 'x'; it must be a list of functions"),
    ({"prompt": "a", "completion": "b", "tools": "[" * 5000}, r"tools is '\[\[.*; it must be a list of functions"),
    ({"prompt": "a", "completion": "b", "tools": "[" * 99 + "]" * 99}, "tools is nested deeper than 64"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, "turn 0 of conversations is from 'bot'; choose of human"),
    ({"conversations": [{"from": "human"}]}, 'turn 0 of conversations is .* it must have a text under "value"'),
    ({"conversations": {}}, "conversations is {}; it must be a list"),
    ({"conversations": [{"from": [], "value": "a"}]}, r"turn 0 of conversations is from \[\]; choose of human"),
    (b'{"text": ' + b"1" * 5000 + b"}", "it is not JSON that can be read: .*4300"),
    (b'{"text": [' + b"[]," * 3_000_000 + b"[]]}", "it has too many values"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "mixes preferences"),
    ({"prompt": [], "completion": "b"}, "prompt is empty"),
    (
        {"image": "a.png", "conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "b"}]},
        "it has <image> 0 times in turns of the user and tools, and 1 pictures under image and images; give one for",
    ),
    ({"images": ["a.png"], "prompt": "<image> <image>", "completion": "<image>"}, "2 times in .*, and 1 pictures"),
    ({"images": [{}], "messages": [USER, REPLY]}, "images holds {}; a picture is a path, a URL or base64"),
    ({"images": ["no.png"], "prompt": "<image>", "completion": "b"}, r"no\.png"),
    ({"system": ["a"], "prompt": "a", "completion": "b"}, r"system is \['a'\]; it must be a text"),
    ({"history": [["a"]], "instruction": "a", "output": "b"}, r"history is .*; it must be a list of"),
    ({"history": [["a", "b"]], "prompt": "a", "completion": "b"}, "history is not read beside prompt; say it in"),
    ({"text": "a", "image": "a.png", "audio": "a.wav"}, "image, audio is not read beside text"),
    ({"messages": [USER, REPLY], "chosen": "a", "rejected": "b"}, "chosen, rejected is not read beside messages"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGED)
def test_a_wrong_line_is_named(line: Any, message: str, processor: Processor, tmp_path: Path) -> None:
    good = json.dumps({"text": "good"}).encode()
    wrong = line if isinstance(line, bytes) else json.dumps(line).encode()
    (tmp_path / "x.jsonl").write_bytes(good + b"\n\n" + wrong + b"\n" + good + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "x.jsonl", processor)
    assert f"{tmp_path / 'x.jsonl'}" in str(caught.value)
    assert "line 3: " in str(caught.value) or "mixes" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'\n\xef\xbb\xbf{"text": "a"}', "line 2: it is not JSON: Unexpected UTF-8 BOM"),
        ("x.jsonl", b"", "holds nothing to learn from: it is empty"),
        ("x.jsonl.gz", b"not gzip", r"cannot be read \(Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("x.jsonl.gz", gzip.compress(b"\n" * (2 << 20), mtime=0), "no text packs so well"),
    ],
)
def test_a_wrong_file(name: str, content: bytes, message: str, processor: Processor, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name, processor)


def test_a_mark_at_a_files_beginning_is_none_of_its_text(processor: Processor, tmp_path: Path) -> None:
    """As some editors write it."""
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [record.text for record in read_records(tmp_path / "x.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("case", ["rows", "values", "page"])
def test_a_table_that_unpacks_to_much_more(case: str, processor: Processor, tmp_path: Path) -> None:
    """A row again and again takes some bits, as does a value of a list."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    tables: dict[str, dict[str, Any]] = {
        "rows": {"text": ["a" * 1000] * 10_000},
        "values": {"text": ["a"], "x": [[0] * (4 << 20)]},
        "page": {"text": ["".join(map(str, range(500_000)))] * 2 + ["a" * (4 << 20)]},
    }
    parquet.write_table(pyarrow.table(tables[case]), tmp_path / "x.parquet", compression="zstd")
    if case == "page":
        assert len(list(read_records(tmp_path / "x.parquet"))) == 3  # not more than text does
        return
    with pytest.raises(DataError, match=r"x\.parquet, line \d+: no text packs so well"):
        list(read_records(tmp_path / "x.parquet"))


def test_no_file(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory"):
        load(tmp_path / "nothing.jsonl", processor)
    with pytest.raises((DataError, ValueError), match="no regular file"):
        load(tmp_path, processor)
