"""`llama4 serve` over real connections: OpenAI's routes, errors, limits, and clients that leave."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from llama4 import Llama4  # noqa: E402
from llama4.engine.observers import PromptLogprobs  # noqa: E402
from llama4.serve.app import Settings  # noqa: E402
from llama4.serve.store import Store  # noqa: E402
from tests.serve.running import FOREVER, QUESTION, Running, until  # noqa: E402

USED = ("prompt_tokens", "completion_tokens", "total_tokens")
PICTURE = Path(__file__).parents[2] / "examples" / "shapes.png"


@pytest.fixture(scope="module")
def running(llm: Llama4, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("media")
    for name in ("inside.png", "in side.png"):
        (directory / name).write_bytes(PICTURE.read_bytes())
    (directory / "link.png").symlink_to(PICTURE)
    (directory / "round.png").symlink_to("round.png")
    (directory / "far").symlink_to("/etc")
    if hasattr(os, "mkfifo"):
        os.mkfifo(directory / "pipe.png")
    with (directory / "large.png").open("wb") as file:
        file.truncate(1 << 40)
    server = Running(llm, Settings("tiny", media_directory=directory, max_body=2**20), max_waiting=8)
    yield server
    server.close()


def alone(llm: Llama4, messages: Any, **options: Any) -> Any:
    limits, llm.processor.image_limits = llm.processor.image_limits, type(llm.processor.image_limits)()
    try:
        return llm.chat(messages, **options)
    finally:
        llm.processor.image_limits = limits


def test_a_chat_is_that_of_the_library(llm: Llama4, running: Running) -> None:
    """Greedily and with a seed, asked one after the other; the engine is idle when the library is asked."""
    for fields in ({}, {"temperature": 1.0, "seed": 7}, {"max_tokens": 4}, {"stop": ["s"]}, {"top_k": -1, "top_p": 1}):
        answer = running.ask(model="tiny", messages=QUESTION, **fields)
        until(running.is_idle)
        options = {"max_new_tokens" if name == "max_tokens" else name: value for name, value in fields.items()}
        options = {name: value for name, value in options.items() if value != -1}
        expected = alone(llm, QUESTION, **options)
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert choice["finish_reason"] == expected.finish_reason
        assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
        assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
        assert answer["object"] == "chat.completion" and answer["model"] == "tiny"


def test_many_at_once_get_their_own(llm: Llama4, running: Running) -> None:
    texts = [f"What is {a} + {b}?" for a in range(3) for b in range(2)]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: running.ask(messages=[{"role": "user", "content": text}]), texts))
    until(running.is_idle)
    expected = [alone(llm, text).text for text in texts]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected


def events(running: Running, route: str, **fields: Any) -> list[Any]:
    with running.client.stream("POST", route, json={**fields, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_joins_to_the_answer(running: Running) -> None:
    options = {"messages": QUESTION, "logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1.0, "seed": 1}
    whole = running.ask(**options)
    *chunks, usage = events(running, "/v1/chat/completions", stream_options={"include_usage": True}, **options)
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] and usage["choices"] == []
    assert len({chunk["id"] for chunk in chunks}) == 1
    for i, choice in enumerate(whole["choices"]):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content") or "" for each in own) == choice["message"]["content"]
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        tokens = [token for each in own for token in (each["logprobs"] or {"content": []})["content"]]
        said = choice["logprobs"]["content"]
        assert [token["token"] for token in tokens] == [token["token"] for token in said]
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)
        assert max(token["logprob"] for token in said[0]["top_logprobs"]) >= said[0]["logprob"] - 1e-4
    assert whole["choices"][0] != whole["choices"][1]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_each_choice_ends_on_its_own(running: Running, route: str) -> None:
    """With its reason, while others go on."""
    asked: dict[str, Any] = {"messages": QUESTION} if "chat" in route else {"prompt": "Once", "echo": True}
    form = {"choice": ["a", "b" * 60]}
    chunks = events(running, route, **asked, n=8, structured_outputs=form, temperature=100, seed=1, max_tokens=100)
    choices = [chunk["choices"][0] for chunk in chunks]
    ends = {choice["index"]: place for place, choice in enumerate(choices) if choice["finish_reason"]}
    assert len(ends) == 8 and choices[min(ends.values())]["finish_reason"] == "stop"
    assert any(re.search('"(content|text)": "b', json.dumps(choice)) for choice in choices[min(ends.values()) :])
    for place, choice in enumerate(choices):
        assert place <= ends[choice["index"]]


def picture(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many shapes are there?"}]
    return [{"role": "user", "content": parts}]


def test_pictures(llm: Llama4, running: Running) -> None:
    """As data and from the media directory; nothing else of this machine or its network is read."""
    data = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    named = ["file:///inside.png", "file://inside.png", "file://localhost/inside.png", "file:///in%20side.png"]
    given = [running.ask(messages=picture(url))["choices"][0] for url in (data, *named)]
    until(running.is_idle)
    expected = alone(llm, picture(data)).text
    assert [choice["message"]["content"] for choice in given] == [expected] * 5
    outside = ["file:///etc/passwd", "file://../inside.png", "file:///link.png", "/etc/passwd", running.url + "/a.png"]
    outside += [
        "file:///%2e%2e/inside.png",
        "file:///\u0000",
        "file:///%00",
        f"file:///{'a' * 300}",
        "file://[",
        "file:///",
    ]
    outside += ["file:///..%2f..%2fetc/passwd", "file:///far/passwd", "FILE:///etc/passwd", "file:////etc/passwd"]
    outside += [
        "file:///dev/zero",
        "file:///~/a.png",
        *(f"file:///{n}.png" for n in ("round", "pipe", "large", "\ud800")),
    ]
    for url in outside:
        answer = running.client.post("/v1/chat/completions", content=json.dumps({"messages": picture(url)}))
        assert answer.status_code == 400 and "root:" not in answer.text, url


def test_completions(llm: Llama4, running: Running) -> None:
    """Of texts and of token ids, several at once, with the prompt repeated."""
    text = "Once upon a time"
    until(running.is_idle)
    reply = llm.complete(text, max_new_tokens=5)
    expected = reply.text
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(text)]
    for prompt in (text, ids, [text, text], [ids]):
        answer = running.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 5, "logprobs": 1}).json()
        count = 2 if prompt == [text, text] else 1
        assert [choice["text"] for choice in answer["choices"]] == [expected] * count
        assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == len(reply.logprobs)
        assert answer["usage"]["prompt_tokens"] == count * len(ids)
    answer = running.client.post("/v1/completions", json={"prompt": text, "max_tokens": 5, "echo": True}).json()
    assert answer["choices"][0]["text"] == text + expected
    body = {"prompt": [ids, text], "max_tokens": 0, "echo": True, "logprobs": 2}
    with torch.inference_mode():
        logprobs = llm.model(torch.tensor([ids])).float().log_softmax(-1)[0]
    for choice in running.client.post("/v1/completions", json=body).json()["choices"]:
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:] == pytest.approx(
            [logprobs[i, id_].item() for i, id_ in enumerate(ids[1:])], abs=1e-4
        )
        largest = [max(each.values()) for each in told["top_logprobs"][1:]]
        assert largest == pytest.approx(logprobs.amax(-1)[:-1].tolist(), abs=1e-4)
        assert len(told["tokens"]) == len(told["text_offset"]) == len(ids)
    (chunk, *_) = events(running, "/v1/completions", **{**body, "prompt": ids})
    streamed = chunk["choices"][0]["logprobs"]
    assert streamed["tokens"] == told["tokens"]
    assert streamed["token_logprobs"][1:] == pytest.approx(told["token_logprobs"][1:], abs=1e-4)
    chunks = events(running, "/v1/completions", prompt=text, max_tokens=5)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_echoed_comes_before_its_replies(running: Running, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Also where a choice speaks before the prompt's probabilities are known. Tokens stand where text_offset says, in
    streams, too, and the begin of text, which the server puts, nowhere."""
    text = "Once \u00e9\U0001f600 upon"
    body = {"prompt": text, "max_tokens": 6, "echo": True, "logprobs": 1, "n": count, "temperature": 1.0, "seed": 3}
    whole = running.client.post("/v1/completions", json=body).json()
    looks = iter([False] * 4)
    monkeypatch.setattr(PromptLogprobs, "is_complete", property(lambda self: next(looks, True)))
    *chunks, usage = events(running, "/v1/completions", **body, stream_options={"include_usage": True})
    assert {name: usage["usage"][name] for name in USED} == {name: whole["usage"][name] for name in USED}
    for i, choice in enumerate(whole["choices"]):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert own[0]["text"] == text and "".join(piece["text"] for piece in own) == choice["text"]
        told = [piece["logprobs"] for piece in own if piece["logprobs"]]
        for name in ("tokens", "text_offset"):
            assert [value for each in told for value in each[name]] == choice["logprobs"][name]
        tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert offsets[:2] == [0, 0] and tokens[0] == "<|begin_of_text|>"
        for token, offset in zip(tokens[1:], offsets[1:], strict=True):
            assert "\ufffd" in token or token.startswith("<|") or choice["text"].startswith(token, offset)


def test_an_echo_alone_has_no_reply(running: Running) -> None:
    body = {"prompt": ["Once", [5, 6]], "max_tokens": 0, "echo": True}
    answer = running.client.post("/v1/completions", json=body).json()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"]


def test_embeddings_are_means_of_hidden_states(llm: Llama4, running: Running) -> None:
    """Also of a text that is read in pieces, and whatever was read before it."""
    texts = ["Once upon a time", "word " * 700, "Once upon a time"]
    answers = [
        running.client.post("/v1/embeddings", json={"input": texts, "encoding_format": form}).json()
        for form in ("float", "base64")
    ]
    until(running.is_idle)
    for text, *data in zip(texts, *(answer["data"] for answer in answers), strict=True):
        input_ids = llm.processor.complete(text).input_ids
        with torch.inference_mode():
            mean = llm.model.hidden_states(input_ids)[0].float().mean(0)
        assert data[0]["embedding"] == pytest.approx(mean.tolist(), abs=1e-4)
        packed = base64.b64decode(data[1]["embedding"])
        assert struct.unpack(f"<{len(mean)}f", packed) == pytest.approx(mean.tolist(), abs=1e-4)
    assert answers[0]["usage"]["prompt_tokens"] == sum(
        llm.processor.complete(text).input_ids.shape[1] for text in texts
    )


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": QUESTION, "model": "gpt-5"}, 404, "model"),
        ({"messages": QUESTION, "temperature": -1}, 400, "temperature"),
        ({"messages": QUESTION, "temperature": "hot"}, 400, "temperature"),
        ({"messages": QUESTION, "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": QUESTION, "n": 99}, 400, "n"),
        ({"messages": QUESTION, "stop": [""]}, 400, "stop[0]"),
        ({"messages": QUESTION, "stream": "yes"}, 400, "stream"),
        ({"messages": QUESTION, "top_logprobs": 2}, 400, "top_logprobs"),
        ({"messages": QUESTION, "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"messages": QUESTION, "response_format": {"type": "xml"}}, 400, "response_format.type"),
        ({"messages": QUESTION, "structured_outputs": {"regex": 5}}, 400, "structured_outputs.regex"),
        ({"messages": QUESTION, "logit_bias": {"5": 101}}, 400, "logit_bias.5"),
        ({"messages": QUESTION, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
        ({"messages": QUESTION, "min_tokens": 2, "structured_outputs": {"regex": "a"}}, 400, "min_tokens"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "messages[0].content"),
        ({"messages": QUESTION, "chat_template_kwargs": {"a": [{"b": "\ude00"}]}}, 400, "chat_template_kwargs.a[0].b"),
        ({"messages": QUESTION, "chat_template_kwargs": {"\ude00": 1}}, 400, "chat_template_kwargs"),
        ({"messages": QUESTION, "audio": {"voice": "x"}}, 400, "audio"),
        ({"messages": QUESTION, "top_k": 2**31}, 400, "top_k"),
        ({"messages": QUESTION, "chat_template_kwargs": {"self": 1}}, 400, "chat_template_kwargs"),
        ({"messages": QUESTION, "guided_json": {"type": "object"}}, 400, "guided_json"),
        ({"messages": QUESTION, "grammar": 'root ::= "a"'}, 400, "grammar"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages"),
    ],
)
def test_errors_name_the_field(running: Running, fields: Any, status: int, field: str | None) -> None:
    answer = running.client.post("/v1/chat/completions", content=json.dumps(fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field), error
    assert error["message"] and error["type"]


def test_structured_output(running: Running) -> None:
    """Of a chat and of a completion; a keyword that is not held is named."""
    schema: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    wanted: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for asked in (wanted, {"type": "json_object", "schema": schema}):  # the second is as llama.cpp has it
        text = running.ask(messages=QUESTION, response_format=asked)["choices"][0]["message"]["content"]
        assert 1 <= json.loads(text)["n"] <= 9
    body = {"prompt": "Once", "structured_outputs": {"choice": ["red", "blue"]}}
    assert running.client.post("/v1/completions", json=body).json()["choices"][0]["text"] in ("red", "blue")
    wanted["json_schema"]["schema"] = {"type": "array", "uniqueItems": True}
    answer = running.client.post("/v1/chat/completions", json={"messages": QUESTION, "response_format": wanted})
    assert answer.status_code == 400 and "uniqueItems" in answer.json()["error"]["message"]
    tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
    choice = running.ask(messages=QUESTION, tools=[tool], tool_choice="required")["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "count"
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    fields = {"messages": QUESTION, "tools": [tool], "tool_choice": "required"}
    chunks = events(running, "/v1/chat/completions", **fields)
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls] == ["count"] and calls[0]["index"] == 0


def test_a_call_in_a_completion_is_text(running: Running) -> None:
    """A chat would have taken it for a call."""
    said = '{"name": "f", "parameters": {}}'
    end = {str(running.engine.llm.tokenizer.special("<|eom|>")): 100}
    body = {
        "prompt": "Once",
        "max_tokens": 40,
        "logit_bias": end,
        "structured_outputs": {"regex": re.escape(said) + ".?"},
    }
    choice = running.client.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (said, "stop")
    pieces = [chunk["choices"][0]["text"] for chunk in events(running, "/v1/completions", **body)]
    assert "".join(pieces) == said and len(pieces) > 3


def test_what_does_not_change_the_reply_is_taken(running: Running) -> None:
    fields = {"user": "me", "reasoning_effort": "low", "presence_penalty": 0, "xyz": 1}
    developer = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    assert running.ask(messages=developer, max_completion_tokens=3, **fields)["usage"]["completion_tokens"] == 3


def test_null_is_as_if_absent(running: Running) -> None:
    """Also inside of objects, as clients send it that dump their dataclasses; what JSON schemas hold is theirs."""
    function = {"name": "f", "description": None, "parameters": {"enum": [None]}, "strict": None}
    tool = {"type": "function", "function": function}
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "name": None, "tool_calls": [call], "refusal": None}
    message = {"role": "user", "content": QUESTION[0]["content"], "name": None, "tool_calls": None}
    form = {"type": "json_object", "schema": None}
    body: dict[str, Any] = {"messages": [message, said, message], "tools": [tool], "response_format": form}
    bare: dict[str, Any] = {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [call]}, *QUESTION]}
    bare["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"enum": [None]}}}]
    counts = [running.ask(**each, max_tokens=1)["usage"]["prompt_tokens"] for each in (body, bare)]
    assert counts[0] == counts[1]
    items = [{"role": "user", "content": "a", "id": None, "type": None}]
    answer = running.client.post("/v1/responses", json={"input": items, "max_output_tokens": 1})
    assert answer.status_code == 200, answer.text
    answer = running.client.post("/v1/responses", json={"input": [{"role": "user", "content": "a", "id": 5}]})
    assert answer.json()["error"]["param"] == "input[0].id"


def test_what_was_refused_is_what_was_said(running: Running) -> None:
    prompts = [
        running.client.post("/apply-template", json={"messages": [*QUESTION, {"role": "assistant", **said}, *QUESTION]})
        for said in (
            {"content": "No."},
            {"content": None, "refusal": "No."},
            {"content": [{"type": "refusal", "refusal": "No."}]},
        )
    ]
    assert prompts[0].status_code == 200 and len({prompt.text for prompt in prompts}) == 1


def test_bodies_that_are_none(running: Running) -> None:
    for body, status in ((b"", 400), (b"{", 400), (b"[1]", 400), (b"[" * 10**5, 400), (b'{"n": NaN}', 400)):
        assert running.client.post("/v1/chat/completions", content=body).status_code == status
    assert running.client.post("/v1/chat/completions", content=b" " * (2**20 + 1)).status_code == 413
    assert running.client.get("/v1/chat/completions").status_code == 405
    answer = running.client.get("/nothing")
    assert answer.status_code == 404 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("completions", {"prompt": ["a"] * 3, "n": 3}),
        ("chat/completions", {"messages": QUESTION, "n": 9}),
        ("embeddings", {"input": ["a"] * 9}),
    ],
)
def test_more_than_the_queue_holds_is_not_to_be_asked_again(running: Running, route: str, fields: Any) -> None:
    answer = running.client.post(f"/v1/{route}", json=fields)
    assert answer.status_code == 400 and "is for 9 replies, and 8 may wait" in answer.text, answer.text


def test_what_is_too_deep_is_refused(running: Running) -> None:
    """Wherever it is, by the name of the field; and ids of a bias are in plain digits."""
    deep: Any = {"type": "integer"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    form = {"type": "json_schema", "json_schema": {"schema": deep}}
    for field, value in (("tools", [tool]), ("response_format", form), ("metadata", deep)):
        answer = running.client.post("/v1/chat/completions", json={"messages": QUESTION, field: value})
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(f"{field} has more than 128")
    itself = {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}
    answer = running.client.post("/v1/chat/completions", json={"messages": QUESTION, "response_format": itself})
    assert answer.status_code == 400 and answer.json()["error"]["message"].endswith("followed: no text has it")
    answer = running.client.post("/v1/chat/completions", json={"messages": QUESTION, "logit_bias": {"\u0663": 1}})
    assert answer.status_code == 400 and "digits 0 to 9" in answer.json()["error"]["message"]


def test_other_routes(llm: Llama4, running: Running) -> None:
    client = running.client
    ids = client.post("/tokenize", json={"prompt": "Hello <|eot|>"}).json()
    assert ids["tokens"] == [llm.tokenizer.bos_id, *llm.tokenizer.encode("Hello <|eot|>")]
    assert client.post("/tokenize", json={"content": "Hello"}).json()["tokens"] == llm.tokenizer.encode("Hello")
    for name in ("add_special", "add_special_tokens"):
        begun = client.post("/tokenize", json={"content": "Hello", name: True}).json()["tokens"]
        assert begun == [llm.tokenizer.bos_id, *llm.tokenizer.encode("Hello")]
    told = client.post("/tokenize", json={"content": "Hi \U0001f600", "with_pieces": True, "return_token_strs": True})
    pieces = [token["piece"] for token in told.json()["tokens"]]
    data = [piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces]
    assert b"".join(data).decode() == "Hi \U0001f600" and any(isinstance(piece, list) for piece in pieces)
    assert told.json()["token_strs"] == [each.decode(errors="replace") for each in data]
    chat = client.post("/tokenize", json={"messages": QUESTION}).json()["tokens"]
    assert chat == llm.processor(QUESTION).input_ids[0].tolist()
    assert client.post("/detokenize", json={"tokens": ids["tokens"][1:]}).json()["prompt"] == "Hello <|eot|>"
    assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    prompt = client.post("/apply-template", json={"messages": QUESTION}).json()["prompt"]
    assert prompt == llm.processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    for name in ("self", "messages", "tools", "chat_template", "tokenize"):
        body = {"messages": QUESTION, "chat_template_kwargs": {name: "x"}}
        assert client.post("/apply-template", json=body).json()["error"]["param"] == "chat_template_kwargs"
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert {client.get(route).status_code for route in ("/health", "/ready", "/version", "/props")} == {200}
    description = client.get("/openapi.json").json()
    assert "ChatRequest" in description["components"]["schemas"] and "/v1/completions" in description["paths"]
    assert client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 1}).status_code == 200
    metrics = client.get("/metrics").text
    samples = {line.partition("{")[0] for line in metrics.splitlines() if not line.startswith("#")}
    assert {"vllm:prompt_tokens_total", "vllm:num_requests_running", "vllm:request_success_total"} <= samples
    assert {f"vllm:{name}_seconds_count" for name in ("time_to_first_token", "e2e_request_latency")} <= samples


def test_a_client_that_leaves_stops_the_work(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is counted as one that has left."""

    def aborted() -> int:
        found = re.search(
            r'request_success_total\{finished_reason="abort".*\} (\d+)', running.client.get("/metrics").text
        )
        return int(found[1]) if found else 0

    until(running.is_idle)
    before = aborted()
    running.hold(monkeypatch)
    with running.client.stream("POST", "/v1/chat/completions", json={**FOREVER, "stream": True}) as answer:
        lines = answer.iter_lines()  # kept: a generator that goes closes the connection
        next(lines)
        until(lambda: not running.is_idle())  # the first token is told while its request is between two lists
    until(running.is_idle)
    with asked(running, "/v1/chat/completions", FOREVER):
        until(lambda: not running.is_idle())
    until(running.is_idle)
    until(lambda: aborted() == before + 2)
    until(running.is_idle)
    until(lambda: not running.engine.scheduler.index.evict() and running.engine.scheduler.pool.used == 0)


def asked(running: Running, route: str, fields: dict[str, Any]) -> socket.socket:
    """The connection of a client that has asked, and may leave."""
    body = json.dumps(fields).encode()
    connection = socket.create_connection(running.listening.getsockname(), timeout=60)
    connection.sendall(f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize(("route", "field"), [("/v1/embeddings", "input"), ("/v1/completions", "prompt")])
def test_a_client_that_leaves_stops_the_reading(
    running: Running, monkeypatch: pytest.MonkeyPatch, route: str, field: str
) -> None:
    """Of texts, before the engine has them: that which is being read is the last."""
    read: list[str] = []
    has_left = threading.Event()

    def held(service: Any, prompt: str) -> None:
        read.append(prompt)
        has_left.wait(60)

    monkeypatch.setattr("llama4.serve.completions.input_of", held)
    with asked(running, route, {field: ["text"] * 8}):
        until(lambda: read)
    until(lambda: running.num_tasks == 1)  # uvicorn's own: nobody is left who would read on
    has_left.set()
    assert len(read) == 1


def test_a_key_and_a_full_queue(llm: Llama4, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(llm, Settings("tiny", api_key="secret"), max_batch=1, max_waiting=1)
    may_go_on = running.hold(monkeypatch)
    try:
        client = running.client
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        client.headers["authorization"] = "Bearer secret"
        answer = client.get("/v1/models", headers={"x-request-id": "mine-1"})
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine-1"
        with client.stream("POST", "/v1/chat/completions", json={**FOREVER, "stream": True}) as first:
            until(lambda: running.engine.scheduler.running.requests)
            with ThreadPoolExecutor(1) as pool:
                second = pool.submit(client.post, "/v1/chat/completions", json={"messages": QUESTION})
                until(lambda: running.engine.num_waiting == 1)
                third = client.post("/v1/chat/completions", json={"messages": QUESTION})
                assert third.status_code == 429 and third.headers["retry-after"]
                first.close()
                may_go_on.set()
                assert second.result().status_code == 200
    finally:
        running.close()


def test_openai_s_client(running: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    whole = client.chat.completions.create(model="tiny", messages=QUESTION)
    pieces = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert client.models.list().data[0].id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)


def test_the_command_ends_what_it_is_at(tmp_path: Path) -> None:
    """SIGTERM while a reply is streamed, and another is made in the background: both come whole, the exit code is 0.
    The end is said."""
    store, pipe = tmp_path / "responses", subprocess.PIPE
    command = [sys.executable, "-m", "llama4", "serve", "tiny", "--port", "0", "--store", str(store)]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ) as process:
        assert process.stdout is not None and process.stderr is not None
        stuck = threading.Timer(600, process.kill)  # so that a failure is one
        stuck.start()
        said = next(line for line in process.stdout if "curl " in line)
        url = re.search(r"http://[\d.:]+", said)
        assert url is not None
        body = {"messages": QUESTION, "stream": True, "ignore_eos": True, "max_tokens": 300}
        with httpx.stream("POST", f"{url[0]}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            asked = {"input": QUESTION, "background": True, "ignore_eos": True, "max_output_tokens": 600}
            kept = httpx.post(f"{url[0]}/v1/responses", json=asked, timeout=60).json()
            assert kept["status"] == "in_progress"
            process.send_signal(signal.SIGTERM)
            *_, reason, end = [line for line in lines if line]
        assert '"length"' in reason and end == "data: [DONE]"
        assert process.wait(60) == 0
        assert process.stderr.read().splitlines()[-1] == "llama4 no longer serves tiny"
        stored = Store(store).get(kept["id"])
        assert stored is not None and stored.response["status"] == "incomplete"
        assert stored.response["usage"]["output_tokens"] == 600
        stuck.cancel()
