"""What a checkpoint says of generation is what happens: stop tokens and defaults of `Llama4`, against transformers'
`generate` on the same random model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llama4 import ConfigError, Llama4, Reply
from llama4.cli.main import main
from llama4.config import GenerationConfig
from llama4.ops import cpu_kernels
from tests import small_model

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "what is this, and why? " * 5}],
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (90, 30), (9, 99, 200))}]}],
]
SAMPLED = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1}
N = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens come again within a reply, and no file that names an eos."""
    directory = small_model.write(tmp_path_factory.mktemp("model"))
    say(directory, model={}, text={})
    return directory


def say(
    directory: Path,
    file: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> None:
    """Let generation_config.json, config.json and its text_config name these, and no other tokens."""
    content = small_model.config().to_dict()
    content = {key: v for key, v in content.items() if key != "eos_token_id"} | (model or {})
    inner = {key: v for key, v in content["text_config"].items() if key != "eos_token_id"} | (text or {})
    (directory / "config.json").write_text(json.dumps(content | {"text_config": inner}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if file is not None:
        (directory / "generation_config.json").write_text(json.dumps(file))


def ids(reply: Reply) -> list[int]:
    return [token.id for token in reply.logprobs]


def generated(directory: Path, llm: Llama4, conversations: list[Any]) -> list[list[int]]:
    """The tokens of transformers' `generate`, on the files as they are, of each conversation alone: in a batch, padding
    moves its positions."""
    from transformers import Llama4ForConditionalGeneration

    reference: Any = Llama4ForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    found = []
    for conversation in conversations:
        inputs = llm.processor(conversation)
        pictures = {} if inputs.pixel_values is None else {"pixel_values": inputs.pixel_values}
        sequence = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        ids_BT = reference.generate(**sequence, **pictures, max_new_tokens=N, pad_token_id=1023)
        found.append(ids_BT[0, inputs.input_ids.shape[1] :].tolist())
    return found


@pytest.fixture(scope="module")
def free(directory: Path) -> list[int]:
    """What the model says if nothing stops it."""
    found = Llama4.from_pretrained(directory).chat(CONVERSATIONS[0], max_new_tokens=N)
    assert (found.finish_reason, len(set(ids(found))) > 8) == ("length", True)
    return ids(found)


@pytest.mark.parametrize("place", ["file", "model", "text", "file and both", "model and text"])
@pytest.mark.parametrize("as_list", [False, True])
def test_the_first_file_that_names_stop_tokens_decides(
    directory: Path, free: list[int], place: str, as_list: bool
) -> None:
    early, middle, late = (free[i] for i in (3, 7, 11))
    assert free.index(early) < free.index(middle) < free.index(late)
    stop = [late, middle] if as_list else middle
    named: dict[str, Any] = {
        "file": {"file": {"eos_token_id": stop}},
        "model": {"model": {"eos_token_id": stop}},
        "text": {"text": {"eos_token_id": stop}},
        "file and both": {
            "file": {"eos_token_id": stop}, "model": {"eos_token_id": early}, "text": {"eos_token_id": [early, late]},
        },
        "model and text": {"model": {"eos_token_id": stop}, "text": {"eos_token_id": [early]}},
    }  # fmt: skip
    say(directory, **named[place])
    llm = Llama4.from_pretrained(directory)
    reply = llm.chat(CONVERSATIONS[0], max_new_tokens=N)
    assert [ids(reply)] == generated(directory, llm, CONVERSATIONS[:1])
    assert ids(reply) == free[: free.index(middle) + 1]
    assert reply.finish_reason == "stop"
    assert set(llm.stop_ids) == ({late, middle} if as_list else {middle})


def test_a_reply_has_the_least_tokens_that_the_file_says(directory: Path, free: list[int]) -> None:
    stop = free[3]
    say(directory, {"eos_token_id": stop, "min_new_tokens": 9})
    llm = Llama4.from_pretrained(directory)
    reply = llm.chat(CONVERSATIONS[0], max_new_tokens=N)
    assert [ids(reply)] == generated(directory, llm, CONVERSATIONS[:1])
    assert len(reply.logprobs) > 9
    assert ids(llm.chat(CONVERSATIONS[0], max_new_tokens=N, min_tokens=0)) == free[: free.index(stop) + 1]
    assert llm.chat("hi", choices=["ab"], max_new_tokens=N).text == "ab", "a form has an end"


@pytest.mark.parametrize("outside", [-1, 999_999])
def test_an_end_outside_of_the_vocabulary_is_no_token(directory: Path, free: list[int], outside: int) -> None:
    say(directory, {"eos_token_id": [outside, free[3]], "min_new_tokens": 9})
    llm = Llama4.from_pretrained(directory)
    assert llm.stop_ids == (free[3],)
    assert len(llm.chat(CONVERSATIONS[0], max_new_tokens=N).logprobs) > 9
    assert llm.chat("hi", choices=["ab"], max_new_tokens=N).text == "ab"


def test_config_json_decides_where_the_other_file_is_silent(directory: Path, free: list[int]) -> None:
    """transformers does not look there then, and goes on to the limit."""
    say(directory, {"temperature": None}, text={"eos_token_id": free[5]})
    llm = Llama4.from_pretrained(directory)
    assert ids(llm.chat(CONVERSATIONS[0], max_new_tokens=N)) == free[: free.index(free[5]) + 1]
    assert generated(directory, llm, CONVERSATIONS[:1]) == [free]


def test_the_tokenizer_decides_where_both_are_silent(directory: Path) -> None:
    say(directory, {"eos_token_id": []})
    llm = Llama4.from_pretrained(directory)
    names = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
    built_in = {llm.tokenizer.special(name) for name in names}
    assert set(llm.stop_ids) == built_in
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|step|>"}))
    assert set(Llama4.from_pretrained(directory).stop_ids) == built_in | {llm.tokenizer.special("<|step|>")}
    (directory / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_a_repetition_penalty_of_a_batch_is_that_of_transformers(
    directory: Path, penalty: float, kernels: bool
) -> None:
    """Greedily, over prompt and reply, pictures included, without padding; alone and together."""
    say(directory, {"repetition_penalty": penalty, "eos_token_id": 1022})
    llm = Llama4.from_pretrained(directory)
    inputs = llm.processor(CONVERSATIONS)
    usual = [ids(llm.chat(each, max_new_tokens=N, repetition_penalty=1.0)) for each in CONVERSATIONS]
    first = torch.tensor([[row[0]] for row in usual])
    inputs = replace(inputs, input_ids=torch.where(inputs.attention_mask.bool(), inputs.input_ids, first))
    with cpu_kernels.any_size() if kernels else nullcontext():
        found = [ids(reply) for reply in llm.chat_batch(inputs, max_new_tokens=N)]
        assert found == [ids(llm.chat(each, max_new_tokens=N)) for each in CONVERSATIONS]
    assert found == generated(directory, llm, CONVERSATIONS)
    assert found != usual


def test_a_penalty_stays_with_its_row(directory: Path) -> None:
    """When the rows before it have ended."""
    say(directory, {"repetition_penalty": 0.5, "eos_token_id": 1022})
    llm = Llama4.from_pretrained(directory)
    alone = [ids(llm.chat(each, max_new_tokens=N)) for each in CONVERSATIONS]
    (*_, stop) = (id_ for id_ in dict.fromkeys(alone[0]) if not any(id_ in row for row in alone[1:]))
    llm.generation_config = replace(llm.generation_config, eos_token_id=(stop,))
    found = [ids(reply) for reply in llm.chat_batch(CONVERSATIONS, max_new_tokens=N)]
    assert found == [alone[0][: alone[0].index(stop) + 1], *alone[1:]]


def test_defaults_are_those_of_the_checkpoint(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(directory, SAMPLED)
    llm = Llama4.from_pretrained(directory)
    explicit: dict[str, Any] = {name: value for name, value in SAMPLED.items() if name != "do_sample"}
    question = CONVERSATIONS[1]
    drawn = llm.chat(question, seed=5, max_new_tokens=N)
    assert drawn == llm.chat(question, seed=5, max_new_tokens=N, **explicit)
    stream = llm.stream(question, seed=5, max_new_tokens=N)
    assert "".join(stream) == drawn.text
    assert llm.chat_batch([question], seed=5, max_new_tokens=N) == [drawn]
    greedy = llm.chat(question, temperature=0, max_new_tokens=N)
    assert ids(greedy) != ids(drawn)
    assert ids(greedy) == ids(llm.chat(question, seed=5, max_new_tokens=N, top_k=1))
    assert ids(llm.chat(question, seed=5, max_new_tokens=N, top_k=2)) not in (ids(greedy), ids(drawn))
    command = ["generate", "--model", str(directory), "--max-new-tokens", str(N), "--seed", "5"]
    assert main([*command, "hi"]) == 0
    assert main([*command, "--temperature", "0", "hi"]) == 0
    assert capsys.readouterr().out == f"{drawn.text}\n{greedy.text}\n"
    completed = llm.complete("ab", seed=5, max_new_tokens=N)
    assert completed == llm.complete("ab", seed=5, max_new_tokens=N, **explicit)


def test_without_do_sample_nothing_is_drawn(directory: Path) -> None:
    say(directory, SAMPLED | {"do_sample": False, "repetition_penalty": 1.0})
    llm = Llama4.from_pretrained(directory)
    greedy = llm.chat(CONVERSATIONS[1], temperature=0, max_new_tokens=N)
    assert ids(llm.chat(CONVERSATIONS[1], max_new_tokens=N)) == ids(greedy)
    assert Llama4.from_pretrained("tiny").generation_config.sampling() == {}


def test_stop_strings_are_a_default(directory: Path) -> None:
    say(directory)
    llm = Llama4.from_pretrained(directory)
    text = llm.chat("hi", max_new_tokens=N).text
    say(directory, {"stop_strings": text[4:6]})
    llm = Llama4.from_pretrained(directory)
    assert llm.chat("hi", max_new_tokens=N).text == text[: text.index(text[4:6])]
    assert llm.chat("hi", max_new_tokens=N, stop=[]).text == text
    assert llm.chat("hi", max_new_tokens=N, stop=text[2:4]).text == text[: text.index(text[2:4])]


def test_what_is_refused_is_refused_before_the_first_piece_and_can_be_set_right(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say(directory, {"num_beams": 4, "repetition_penalty": 0.5})
    llm = Llama4.from_pretrained(directory)
    assert "asks for num_beams = 4" in caplog.text  # while it is loaded
    with pytest.raises(ConfigError, match=r"generation_config\.json asks for num_beams = 4, .* content={}\)"):
        llm.stream("hi")
    llm.generation_config = replace(llm.generation_config, content={})
    expected = llm.chat("hi", max_new_tokens=4)
    assert ids(expected) == ids(llm.chat("hi", max_new_tokens=4, repetition_penalty=0.5))
    llm.generation_config = replace(llm.generation_config, eos_token_id=(expected.logprobs[1].id,))
    assert llm.chat("hi", max_new_tokens=4).finish_reason == "stop"


@pytest.mark.parametrize("changed", [False, True])
def test_what_config_json_says_of_generation_is_saved_where_it_will_be_read(
    directory: Path, tmp_path: Path, changed: bool
) -> None:
    """Beside a generation_config.json, which is written, nobody looks there."""
    say(directory, model={"do_sample": True, "temperature": 0.5}, text={"eos_token_id": [5, 7], "top_k": 9})
    llm = Llama4.from_pretrained(directory)
    expected = {"temperature": 0.5, "top_p": 1.0, "top_k": 9, "min_p": 0.0}
    if changed:
        llm.generation_config = replace(llm.generation_config, temperature=0.25, eos_token_id=(5,))
        expected["temperature"] = 0.25
    llm.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    again = GenerationConfig.from_dict(saved)
    assert again.sampling() == llm.generation_config.sampling() == expected
    assert again.eos_token_id == llm.stop_ids == ((5,) if changed else (5, 7))
    if not changed:
        assert main(["convert", "--to", "hf", str(directory), str(tmp_path / "converted")]) == 0
        assert json.loads((tmp_path / "converted" / "generation_config.json").read_text()) == saved


def test_info_tells_them(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(directory, SAMPLED | {"eos_token_id": [897, 5], "stop_strings": ["##"], "max_length": 99, "bos_token_id": 1})
    assert main(["info", str(directory)]) == 0
    lines = dict(line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines["ends"] == "at     897 <|end_of_text|>, 5, '##'"
    expected = (
        "drawn, temperature 1.2, top_p 0.9, top_k 30, min_p 0.01, repetition_penalty 1.1, max_length 99 (no effect)"
    )
    assert lines["sampling"] == expected
    say(directory, {"num_beams": 4})
    assert main(["info", "--json", str(directory)]) == 0
    facts = json.loads(capsys.readouterr().out)["replies"]
    assert facts["stop_tokens"] == {"897": "<|end_of_text|>", "903": "<|eom|>", "904": "<|eot|>"}
    assert (facts["sampling"], facts["refused"]) == (None, {"num_beams": 4})
    assert main(["info", "tiny"]) == 0
    assert "  sampling    greedy\n" in capsys.readouterr().out
    assert main(["info", "scout"]) == 0
    assert "ends at" not in capsys.readouterr().out
