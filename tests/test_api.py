"""`Llama4` as a whole, on a random model loaded from a directory."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llama4 import (
    ChatTemplateError,
    CheckpointError,
    ContextLengthError,
    ImageError,
    Llama4,
    Reply,
    TextDelta,
    ToolCallDelta,
)
from llama4.cli.main import main
from llama4.config import GenerationConfig, scout
from llama4.engine.tokens import Event, FinishReason, Token
from llama4.errors import ArgumentError, Llama4Error
from llama4.model.device import resolve_device, resolve_dtype
from llama4.tiny import EMBEDDED
from tests import small_model

RED = Image.new("RGB", (50, 40), (255, 0, 0))
TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Llama4:
    return Llama4.from_pretrained(directory)


def ask(text: str, *pictures: object) -> list[dict[str, object]]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


CONVERSATIONS = [ask("what?", RED), ask("hi"), ask("compare", RED, Image.new("RGB", (200, 30), (0, 0, 255)))]


def test_a_reply(llm: Llama4) -> None:
    reply = llm.chat(ask("what is this?", RED), max_new_tokens=12)
    assert isinstance(reply, Reply)
    assert str(reply) == reply.text
    assert reply.finish_reason == "length"
    assert reply.tool_calls == []
    prompt = llm.processor(ask("what is this?", RED)).input_ids.shape[1]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, 12)
    assert reply.usage.total_tokens == prompt + 12
    ids = [token.id for token in reply.logprobs]
    assert llm.tokenizer.decode(ids).rstrip("\ufffd") == reply.text.rstrip("\ufffd")
    assert all(token.logprob <= 0 for token in reply.logprobs)


def test_what_is_printed_of_it(directory: Path) -> None:
    printed = repr(Llama4.from_pretrained(directory, max_context=512, progress=False))
    assert printed == "Llama4(313K parameters, float32 on cpu, up to 512 tokens)"


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["e", "on"]}])
def test_pieces_of_a_stream_join_to_the_reply(llm: Llama4, settings: dict[str, object]) -> None:
    for conversation in CONVERSATIONS:
        stream = llm.stream(conversation, max_new_tokens=30, **settings)  # type: ignore[arg-type]
        pieces = list(stream)
        assert all(pieces)
        llm.cache = None  # else a chunk that the reply began is read again, from its border, in other pieces
        expected = llm.chat(conversation, max_new_tokens=30, **settings)  # type: ignore[arg-type]
        assert "".join(pieces) == expected.text
        assert stream.reply == expected


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 20, "seed": 3}])
def test_a_batch_gives_what_each_row_gives_alone(llm: Llama4, settings: dict[str, object]) -> None:
    together = llm.chat_batch(CONVERSATIONS, max_new_tokens=20, **settings)  # type: ignore[arg-type]
    for reply, conversation in zip(together, CONVERSATIONS, strict=True):
        alone = llm.chat(conversation, max_new_tokens=20, **settings)  # type: ignore[arg-type]
        assert (reply.text, reply.usage, reply.finish_reason) == (alone.text, alone.usage, alone.finish_reason)
    assert llm.chat_batch([]) == []


def test_seeds(llm: Llama4) -> None:
    def draw(seed: int | None) -> str:
        return llm.chat("hi", temperature=1.5, seed=seed, max_new_tokens=20).text

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_string_is_one_question(llm: Llama4) -> None:
    expected = llm.chat([{"role": "user", "content": "hello"}], max_new_tokens=8)
    assert llm.chat("hello", max_new_tokens=8) == expected
    assert llm.chat_batch(["hello", "hi"], max_new_tokens=8)[0].text == expected.text


def test_tokens_that_the_model_has_not_end_no_reply(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama4.from_pretrained(directory)
    llm.generation_config = GenerationConfig()
    llm.model.config = replace(llm.config, text=replace(llm.config.text, eos_token_id=()))
    inside, size = llm.tokenizer.stop_ids[0], llm.config.text.vocab_size
    monkeypatch.setattr(llm.tokenizer, "stop_ids", (inside, size))
    assert llm.stop_ids == (inside,)
    assert llm.chat("hi", max_new_tokens=3, min_tokens=2).usage.completion_tokens == 3
    assert llm.chat("hi", max_new_tokens=3, regex="ab").text == "ab"
    monkeypatch.setattr(llm.tokenizer, "stop_ids", (size,))
    assert llm.chat("hi", max_new_tokens=3, min_tokens=2).usage.completion_tokens == 3
    with pytest.raises(Llama4Error, match="no token of the vocabulary ends a reply"):
        llm.chat("hi", regex="ab")


def test_completion_goes_on_without_a_chat_format(llm: Llama4) -> None:
    reply = llm.complete("Once upon", max_new_tokens=8)
    ids = torch.tensor([[llm.tokenizer.bos_id, *llm.tokenizer.encode("Once upon")]])
    assert reply.usage.prompt_tokens == ids.shape[1]
    with torch.inference_mode():
        assert reply.logprobs[0].id == int(llm.model(ids)[0, -1].argmax())
    assert "".join(llm.stream(llm.processor.complete("Once upon"), max_new_tokens=8)) == reply.text


def test_an_image_may_come_in_any_form(llm: Llama4, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    RED.save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    replies = {
        llm.chat(ask("what?", source), max_new_tokens=12).text
        for source in (RED, buffer.getvalue(), url, tmp_path / "red.png", str(tmp_path / "red.png"))
    }
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    replies.add(llm.chat([{"role": "user", "content": parts}], max_new_tokens=12).text)
    assert len(replies) == 1


def test_leaving_a_stream_leaves_the_model_usable(llm: Llama4) -> None:
    expected = llm.chat("hello", max_new_tokens=8)
    stream = llm.stream("hello", max_new_tokens=8)
    next(stream)
    partial = stream.reply
    assert partial.finish_reason is None
    assert 0 < partial.usage.completion_tokens < 8
    assert llm.chat("hello", max_new_tokens=8) == expected


CALL = '{"name": "add", "parameters": {"a": 1}}'


@pytest.fixture
def say(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets the model say these texts, one a row: special tokens by their names, the rest character by character."""
    special = llm.tokenizer.special_tokens
    ends = ("<|eot|>", "<|eom|>")

    def events(*texts: str) -> Iterator[Event]:
        for row, text in enumerate(texts):
            words = [word for word in re.split(r"(<\|\w+\|>)|(.)", text, flags=re.DOTALL) if word]
            for i, word in enumerate(words):
                reason: FinishReason | None = "stop" if word in ends else "length" if i == len(words) - 1 else None
                yield Event(row, Token(special.get(word, 1), b"", 0.0), "" if word in special else word, reason)

    def set_texts(*texts: str) -> None:
        monkeypatch.setattr("llama4.api.generate", lambda *_, **__: events(*texts))
        llm.cache = None

    yield set_texts
    llm.cache = None  # which holds keys and values of nothing


@pytest.mark.parametrize(
    ("text", "tools", "said", "calls"),
    [
        (f"Sure. {CALL}<|eot|>", [TOOL], "Sure.", ["add"]),
        (f"{CALL}<|eot|>", None, CALL, []),  # an answer that happens to be JSON
        (f"Sure. {CALL}<|eom|>", None, "Sure.", ["add"]),  # announced in the conversation
        ("<|python_start|>[add(a=1), add(a=1)]<|python_end|><|eot|>", None, "", ["add", "add"]),
        ("<|python_start|>[add(a=1)]<|python_end|><|eom|>", [TOOL], "", ["add"]),
        ('<|python_start|>print("1")<|python_end|><|eom|>', None, "", ["code_interpreter"]),
        (f"Sure. {CALL}", [TOOL], "Sure.", ["add"]),  # the limit came behind the call
        (f"Sure. {CALL[:-1]}", [TOOL], f"Sure. {CALL[:-1]}", []),
        (f"<|python_start|>{CALL}", [], CALL, []),
    ],
)
def test_tool_calls(
    llm: Llama4,
    say: Callable[..., None],
    text: str,
    tools: list[dict[str, object]] | None,
    said: str,
    calls: list[str],
) -> None:
    """Read alike by chat, chat_batch and stream, which tells them as they come."""
    say(text, "No.<|eot|>")
    replies = llm.chat_batch(["hi", "hi"], tools=tools)
    say(text)
    reply = llm.chat("hi", tools=tools)
    assert reply == replies[0]
    assert (reply.text, [call.name for call in reply.tool_calls]) == (said, calls)
    reason = "stop" if text.endswith("|>") else "length"
    assert reply.finish_reason == ("tool_calls" if calls else reason)
    assert (replies[1].text, replies[1].finish_reason) == ("No.", "stop")

    say(text)
    pieces = list(stream := llm.stream("hi", tools=tools))
    assert all(pieces)
    assert "".join(pieces) == stream.reply.text == said
    assert stream.reply == reply

    say(text)
    deltas = list((stream := llm.stream("hi", tools=tools)).events())
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == said
    found: dict[int, tuple[str, str, str]] = {}
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            before = found.get(delta.index, (delta.id, delta.name, ""))
            assert before[:2] == (delta.id, delta.name)
            found[delta.index] = (*before[:2], before[2] + delta.arguments)
    assert sorted(found) == list(range(len(calls)))
    for (id_, name, arguments), call in zip(found.values(), stream.reply.tool_calls, strict=True):
        assert (id_, name, json.loads(arguments)) == (call.id, call.name, call.arguments)


def test_calls_come_before_the_reply_ends(llm: Llama4, say: Callable[..., None]) -> None:
    say(f"Look: {CALL} Wait.<|eot|>")
    stream = llm.stream("hi", tools=[TOOL])
    assert next(stream) == "L"
    events = stream.events()
    while not isinstance(event := next(events), ToolCallDelta):
        assert event.text in "ook:"
    assert stream.reply.usage.completion_tokens == len(f"Look: {CALL}")
    assert stream.reply.tool_calls[0].id == event.id
    assert "".join(stream) == "  Wait."  # pieces and events take turns
    assert stream.reply.text == "Look:  Wait."


def test_tools_reach_the_prompt(llm: Llama4) -> None:
    plain, with_tools = llm.chat("hi", max_new_tokens=1), llm.chat("hi", max_new_tokens=1, tools=[TOOL])
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens + 50


def test_saving_and_loading_again(llm: Llama4, tmp_path: Path) -> None:
    llm.save_pretrained(tmp_path / "saved")
    again = Llama4.from_pretrained(tmp_path / "saved")
    assert again.config == llm.config
    for (name, a), (_, b) in zip(llm.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.tokenizer.special_tokens == llm.tokenizer.special_tokens
    assert again.chat(CONVERSATIONS[2], max_new_tokens=12) == llm.chat(CONVERSATIONS[2], max_new_tokens=12)


def test_pushing_uploads_what_saving_writes(llm: Llama4, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def push(directory: Path, repo_id: str, **options: object) -> str:
        shutil.copytree(directory, tmp_path / "pushed")
        return f"{repo_id} {options['token']} {options['private']} {options['revision']} {options['commit_message']}"

    monkeypatch.setattr("llama4.weights.hub.push", push)
    options: Any = {"token": "t", "private": True, "revision": "dev", "commit_message": "Better"}
    assert llm.push_to_hub("me/mine", **options) == "me/mine t True dev Better"
    with pytest.raises(ValueError, match="create_pr opens a pull request of its own; leave out revision='dev'"):
        llm.push_to_hub("me/mine", revision="dev", create_pr=True)
    llm.save_pretrained(tmp_path / "saved")
    pushed, saved = ({path.name for path in (tmp_path / name).iterdir()} for name in ("pushed", "saved"))
    assert pushed == saved


# -- how it is loaded ----------------------------------------------------------------------------------------------


def test_another_thread_may_set_the_cache_meanwhile(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.chat("hi", max_new_tokens=3).text
    reads: list[object] = []

    def read(_: object) -> object:
        """What a thread meets which reads again what another has taken away."""
        reads.append(None)
        return kept if len(reads) == 1 else None

    kept = llm.cache
    monkeypatch.setattr(Llama4, "cache", property(read, lambda *_: None), raising=False)
    assert llm.chat("hi", max_new_tokens=3).text == expected
    assert len(reads) == 1


def test_the_model_alone_loads_without_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.model").unlink()
    bare = Llama4.from_pretrained(tmp_path / "bare")
    assert bare.model(torch.tensor([[1, 2, 3]])).shape == (1, 3, small_model.RANKS + small_model.SPECIAL)
    for part in (lambda: bare.tokenizer, lambda: bare.processor, lambda: bare.chat("hi")):
        with pytest.raises(ValueError, match=r"without a tokenizer; put its tokenizer\.json or tokenizer\.model"):
            part()


def test_dtypes(directory: Path) -> None:
    assert Llama4.from_pretrained(directory, dtype="bfloat16").model.dtype == torch.bfloat16
    exact = Llama4.from_pretrained(directory, dtype=torch.float64)
    assert exact.model.dtype == torch.float64
    assert exact.config.dtype == "float64"
    assert exact.chat("hi", max_new_tokens=4).usage.completion_tokens == 4
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("auto", small_model.config(), cpu) == torch.float32
    assert resolve_dtype("auto", scout(), cpu) == torch.bfloat16
    assert resolve_dtype("auto", scout(), cuda) == torch.bfloat16


@pytest.mark.parametrize("experts", ["loop", "grouped"])
def test_experts(directory: Path, llm: Llama4, experts: str) -> None:
    chosen = Llama4.from_pretrained(directory, experts=experts)
    names = {getattr(module, "name", None) for module in chosen.model.modules()} - {None}
    assert names == {experts}
    assert chosen.chat("hi", max_new_tokens=8).text == llm.chat("hi", max_new_tokens=8).text


def test_how_it_was_resolved_is_logged(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llama4"):
        Llama4.from_pretrained(directory)
    assert "experts: loop on cpu in torch.float32" in caplog.text


def test_max_context(directory: Path) -> None:
    short = Llama4.from_pretrained(directory, max_context=30)
    with pytest.raises(ContextLengthError, match=r"holds 30, .* raise max_context=30"):
        short.chat("7" * 40)
    reply = short.complete("7" * 20)
    assert reply.usage.total_tokens == 30
    assert reply.finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int2"}, "quantization='int2' is not known; choose one of int4, int8, fp8"),
        (
            {"quantization": "int4"},
            "48 inputs and 64 outputs; int4 takes multiples of 32 and of 16: choose int8 or fp8",
        ),
        ({"dtype": "int8"}, "dtype='int8' is not supported; choose 'auto' or one of bfloat16"),
        ({"device": "abacus"}, "device='abacus' cannot be used .* try 'auto', 'cpu'"),
        ({"experts": "many"}, "experts='many' is not known; choose 'auto'"),
        ({"max_context": 1}, "max_context is 1; it must be between 2 and this model's window, 4096"),
        ({"max_context": 4097}, "max_context is 4097; it must be between 2 and"),
    ],
)
def test_settings_that_cannot_be(directory: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama4.from_pretrained(directory, **settings)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_no_cuda() -> None:
    with pytest.raises(ValueError, match=r"device='cuda' cannot be used .* try 'auto', 'cpu' or 'cuda'"):
        resolve_device("cuda")


def broken(directory: Path, target: Path, **changes: object) -> Path:
    """A copy whose config.json says something else."""
    shutil.copytree(directory, target)
    content = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(content))
    return target


def test_a_checkpoint_quantized_in_another_way_is_refused(directory: Path, tmp_path: Path) -> None:
    path = broken(directory, tmp_path / "q", quantization_config={"quant_method": "hqq"})
    with pytest.raises(ValueError, match=r"by HQQ \(quant_method 'hqq'\), which .* not read; .*or in bf16"):
        Llama4.from_pretrained(path)


def test_the_tokenizer_of_another_model_is_refused(directory: Path, tmp_path: Path) -> None:
    path = broken(directory, tmp_path / "t", image_token_index=3)
    with pytest.raises(ValueError, match=r"<\|patch\|> is 988 in .*image_token_index is 3; use the tokenizer"):
        Llama4.from_pretrained(path)
    other = broken(directory, tmp_path / "v")
    lines = [b"%s %d" % (base64.b64encode(bytes([i % 256, i // 256])), i) for i in range(256, 2000)]
    with (other / "tokenizer.model").open("wb") as file:
        file.write(b"\n".join([*(b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)), *lines]))
    with pytest.raises(ValueError, match=r"ids up to 4047, but the model embeds 1024; use the tokenizer"):
        Llama4.from_pretrained(other)


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c"])
def test_no_such_model(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*'tiny'.*directory.*organisation/name"):
        Llama4.from_pretrained(name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere at all"])
def test_no_such_path(name: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no '{name}'; check the path"):
        Llama4.from_pretrained(name)


def test_a_directory_without_a_model(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it is empty; fetch the model again"):
        Llama4.from_pretrained(tmp_path)
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no weights"):
        Llama4.from_pretrained(tmp_path)


# -- what it refuses to answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ([], "empty"),
        ([{"role": "king", "content": "x"}], "'king'; the roles are system, developer, user"),
        ([{"role": "user"}], "content None"),
        (ask("x", "/no/such/file.png"), "no such image file: /no/such/file.png"),
        (ask("x", b"not an image"), "not an image"),
        (ask("\ud800"), "surrogate"),
        ([{"role": "user", "content": [{"type": "image"}]}], "1 image part without a picture"),
        ([ask("x"), ask("y")], "2 conversations; use chat_batch"),
    ],
)
def test_bad_messages(llm: Llama4, messages: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.chat(messages)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):  # before the first piece
        llm.stream(messages)  # type: ignore[arg-type]


def test_an_image_that_cannot_be_read_is_an_image_error(llm: Llama4) -> None:
    with pytest.raises(ImageError):
        llm.chat(ask("x", b"not an image"))


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"seed": -1}, {"max_new_tokens": 0}, {"stop": ""}]
)
def test_bad_settings_are_refused_before_the_first_piece(llm: Llama4, settings: dict[str, object]) -> None:
    name, value = next(iter(settings.items()))
    message = "stop string is empty" if name == "stop" else f"{name} is {value}"
    with pytest.raises(ValueError, match=message):
        llm.stream("hi", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, [2.5, "3", None, True, 0]) for name in ("max_new_tokens", "n")),
        ("top_logprobs", [None, 1.5, True, -1]),
        *((name, [1.5, "1", True, -1]) for name in ("min_tokens", "seed")),
        *((name, ["1", True, float("nan"), 3]) for name in ("presence_penalty", "frequency_penalty")),
        *((name, ["1", True, float("nan"), -1]) for name in ("temperature", "top_p", "top_k", "min_p")),
        ("stop", [5, [5], b"x", [b"x"]]),
        ("logit_bias", [[1, 2], {"x": 1}, {None: 1}, {1.5: 1}, 5]),
        ("regex", [5, b"x"]),
        ("grammar", [["x"]]),
    ],
)
def test_values_of_another_kind_are_refused_by_name(llm: Llama4, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ArgumentError, match=rf"^{name} is {re.escape(repr(value))}; it must be "):
            llm.chat("hi", **{name: value})


def test_other_arguments_of_another_kind_are_refused_by_name(llm: Llama4) -> None:
    bias: Any
    value: Any
    for bias in ({3: "x"}, {3: None}, {3: True}):
        with pytest.raises(ArgumentError, match=r"^logit_bias of token 3 is .*; it must be a number from -100 to 100"):
            llm.chat("hi", logit_bias=bias)
    for value in (10.5, "10", True):
        with pytest.raises(ArgumentError, match=r"^max_context is .*; it must be between 2 and .* a whole number"):
            Llama4(llm.model, llm.tokenizer, max_context=value)
    with pytest.raises(ArgumentError, match=r"^conversations is a list of messages; give a list of conversations"):
        llm.chat_batch([{"role": "user", "content": "hello"}])  # type: ignore[list-item]
    assert len(llm.chat_batch(iter(["hi"]), max_new_tokens=1)) == 1  # type: ignore[arg-type]
    for value in ("hello", {"role": "user", "content": "hello"}):
        with pytest.raises(ArgumentError, match=r"^conversations is .*hello.*; it must be a list"):
            llm.chat_batch(value)
    for value in (None, 5, b"hello"):
        with pytest.raises(ArgumentError, match=r"^conversations is .*; it must be a list"):
            llm.chat_batch(value)
        with pytest.raises(ArgumentError, match=r"^conversation 1 is .*; it must be a text, or a list of messages"):
            llm.chat_batch(["hi", value])
        with pytest.raises(ArgumentError, match=r"^text is .*; it must be a text, or a list of texts"):
            llm.complete(value)
    with pytest.raises(ArgumentError, match="temperature is"):
        llm.chat_batch([], temperature=-1.0)
    value = "0.5"
    with pytest.raises(ArgumentError, match=r"^threshold is '0\.5'; it must be"):
        llm.moderate("hi", threshold=value)
    unknown: Any = {"top_x": None}
    for ask_for in (llm.stream, llm.chat, llm.complete):
        with pytest.raises(TypeError, match=r"top_x is no option of a reply \(did you mean top_[kp]\?\)"):
            ask_for("hi", **unknown)
    with pytest.raises(TypeError, match="top_x is no option"):
        llm.chat_batch([], **unknown)
    servers_word: Any = {"max_tokens": 5}
    with pytest.raises(TypeError, match=r"max_tokens is no option of a reply \(did you mean max_new_tokens\?\)"):
        llm.chat("hi", **servers_word)


def test_numbers_may_be_numpys(llm: Llama4) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 3, "top_k": 5, "seed": 7, "top_logprobs": 2, "min_tokens": 1, "n": 2}
    numbers: dict[str, Any] = {"temperature": 0.5, "top_p": 0.5, "presence_penalty": 0.5}
    theirs: dict[str, Any] = {name: np.int64(value) for name, value in settings.items()}
    theirs |= {name: np.float32(value) for name, value in numbers.items()}
    biases: Any = {np.int64(5): np.float32(2)}
    assert llm.chat("hi", **theirs, logit_bias=biases) == llm.chat("hi", **settings, **numbers, logit_bias={5: 2})


# -- the embedded model --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (EMBEDDED["tiny"] / "config.json").is_file(), reason="the embedded model is not built yet")
def test_the_embedded_model_answers() -> None:
    llm = Llama4.from_pretrained("tiny")
    white = Image.new("RGB", (200, 160), "white")
    white.paste((255, 0, 0), (60, 40, 130, 110))
    assert "red" in llm.chat(ask("What colour is the square?", white)).text.lower()


OWN = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role | upper }}<|header_end|>{{ m.content }}<|eom|>"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", OWN),
        ("chat_template.json", {"chat_template": OWN}),
        ("processor_config.json", {"chat_template": OWN}),
        ("tokenizer_config.json", {"chat_template": OWN}),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": OWN}, {"name": "tool_use", "template": OWN + "TOOLS"}]},
        ),
    ],
)
def test_a_checkpoints_own_template_is_what_the_model_reads(
    file: str, content: object, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    if isinstance(content, dict):
        before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
        content = json.dumps(before | content)
    (tmp_path / file).write_text(str(content))
    llm = Llama4.from_pretrained(tmp_path)
    text = "<|begin_of_text|><|header_start|>USER<|header_end|><|eot|> x<|eom|>"
    messages = [{"role": "user", "content": "<|eot|> x"}]
    ids = llm.processor.apply_chat_template(messages, tokenize=True)
    assert llm.tokenizer.decode(ids) == text == llm.processor.apply_chat_template(messages)
    special = {i: name for name, i in llm.tokenizer.special_tokens.items()}
    own = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>"]
    assert [special[i] for i in ids if i in special] == own
    with_tools = isinstance(content, str) and "TOOLS" in content
    assert llm.processor.apply_chat_template(messages, tools=[TOOL]) == text + "TOOLS" * with_tools
    assert llm.chat(messages, max_new_tokens=3).usage.prompt_tokens == len(ids)
    assert main(["info", str(tmp_path)]) == 0
    names = " (default, tool_use)" if with_tools else ""
    assert f"prompts     by the checkpoint's own chat template{names}\n" in capsys.readouterr().out


def test_a_template_that_fails_is_named_when_it_is_used(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    llm = Llama4.from_pretrained(tmp_path)
    with pytest.raises(ChatTemplateError, match="malformed in line 1"):
        llm.chat("x")
    assert llm.complete("x", max_new_tokens=2).text is not None
    assert main(["info", str(tmp_path)]) == 0
    assert "own chat template; the chat template is malformed" in capsys.readouterr().out


def test_a_last_message_of_the_assistant_is_continued(llm: Llama4) -> None:
    messages: list[dict[str, Any]] = [*ask("what is this?", RED), {"role": "assistant", "content": "It is a"}]
    text = llm.processor.apply_chat_template(messages[:1], add_generation_prompt=True) + "It is a"
    expected = llm.chat(llm.processor.complete(text, special_tokens=True, images=[RED]), max_new_tokens=8)
    assert llm.chat(messages, max_new_tokens=8).text == expected.text
    assert (
        llm.stream(messages, max_new_tokens=8, continue_final_message=True).reply.usage.prompt_tokens
        == expected.usage.prompt_tokens
    )
    assert llm.chat_batch([messages, ask("hi")], max_new_tokens=8)[0].text == expected.text
    apart = llm.chat(messages, max_new_tokens=8, continue_final_message=False)
    assert apart.usage.prompt_tokens > expected.usage.prompt_tokens
    header = "<|header_start|>user<|header_end|>"
    told = llm.complete(header, max_new_tokens=2, special_tokens=True).usage.prompt_tokens
    assert told == 3 + len(llm.tokenizer.encode("user"))
    assert told < llm.complete(header, max_new_tokens=2).usage.prompt_tokens


def test_tools_may_be_announced_in_the_system_message(llm: Llama4) -> None:
    options: dict[str, Any] = {
        "tools": [TOOL],
        "chat_template_kwargs": {"tools_in_user_message": False},
        "max_new_tokens": 2,
    }
    expected = llm.processor(ask("hi"), tools=[TOOL], chat_template_kwargs={"tools_in_user_message": False})
    assert llm.chat(ask("hi"), **options).usage.prompt_tokens == expected.input_ids.shape[1]
    assert "<|header_start|>system" in llm.tokenizer.decode(expected.input_ids[0].tolist())
    with pytest.raises(ValueError, match="enable_thinking cannot be given"):
        llm.chat("hi", chat_template_kwargs={"enable_thinking": False})
