"""/v1/messages: the answers are those of chats; events join to them; errors have Anthropic's form."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from llama4 import Llama4  # noqa: E402
from llama4.serve.settings import Settings  # noqa: E402
from tests.serve.running import QUESTION, Running  # noqa: E402

PICTURE = Path(__file__).parents[2] / "examples" / "shapes.png"
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle"]}},
    "required": ["shape"],
    "additionalProperties": False,
}
TOOL = {"name": "count", "description": "Counts shapes", "input_schema": SCHEMA}
THEIR_TOOL = {
    "type": "function",
    "function": {"name": "count", "description": "Counts shapes", "parameters": SCHEMA},
}


@pytest.fixture(scope="module")
def running(llm: Llama4) -> Iterator[Running]:
    server = Running(llm, Settings("tiny", api_key="secret"))
    server.client.headers["x-api-key"] = "secret"
    yield server
    server.close()


def message(running: Running, **fields: Any) -> Any:
    answer = running.client.post("/v1/messages", json={"model": "tiny", "max_tokens": 64, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(running: Running, **fields: Any) -> list[Any]:
    body = {"model": "tiny", "max_tokens": 64, "stream": True, **fields}
    with running.client.stream("POST", "/v1/messages", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    found = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [f"event: {event['type']}" for event in found] == lines[::2]
    return found


def test_a_message_is_that_of_a_chat(running: Running) -> None:
    """With a system prompt, pictures, what tools said, and stop strings."""
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    ask = {"type": "text", "text": "How many shapes are there?"}
    call = {"type": "tool_use", "id": "1", "name": "count", "input": {"shape": "circle"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "3"}]}
    link = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    said = {"id": "1", "type": "function", "function": {"name": "count", "arguments": '{"shape": "circle"}'}}
    pairs: list[tuple[dict[str, Any], list[Any], dict[str, Any]]] = [
        ({"messages": QUESTION}, QUESTION, {}),
        ({"messages": QUESTION, "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *QUESTION], {}),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": source}, ask]}]},
            [{"role": "user", "content": [link, ask]}],
            {},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [ask]},
                    {"role": "assistant", "content": [call]},
                    {"role": "user", "content": [result, ask]},
                ],
                "tools": [TOOL],
            },
            [
                {"role": "user", "content": [ask]},
                {"role": "assistant", "content": None, "tool_calls": [said]},
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "3"}]},
                {"role": "user", "content": [ask]},
            ],
            {"tools": [THEIR_TOOL]},
        ),
    ]
    for ours, theirs, options in pairs:
        chat = running.ask(messages=theirs, max_tokens=64, **options)
        answer = message(running, **ours)
        assert "".join(block["text"] for block in answer["content"]) == chat["choices"][0]["message"]["content"]
        usage = answer["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
        count = running.client.post("/v1/messages/count_tokens", json={"model": "tiny", **ours}).json()
        assert count == {"input_tokens": chat["usage"]["prompt_tokens"]}
    text = message(running, messages=QUESTION)["content"][0]["text"]
    stopped = message(running, messages=QUESTION, stop_sequences=[text[5:8]])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[5:8])
    assert message(running, messages=QUESTION, max_tokens=2)["stop_reason"] == "max_tokens"


def test_events_join_to_the_message(running: Running) -> None:
    for options in ({}, {"tools": [TOOL], "tool_choice": {"type": "any"}}):
        whole = message(running, messages=QUESTION, **options)
        first, *middle, delta, last = events(running, messages=QUESTION, **options)
        assert first["type"] == "message_start" and first["message"]["content"] == [] and last["type"] == "message_stop"
        assert delta["delta"]["stop_reason"] == whole["stop_reason"]
        assert delta["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
        starts = [event for event in middle if event["type"] == "content_block_start"]
        assert [event["index"] for event in starts] == list(range(len(whole["content"])))
        for i, block in enumerate(whole["content"]):
            own = [event["delta"] for event in middle if event["index"] == i and event["type"] == "content_block_delta"]
            if block["type"] == "text":
                assert "".join(piece["text"] for piece in own) == block["text"]
            else:
                assert (
                    json.loads("".join(piece["partial_json"] for piece in own)) == block["input"] == {"shape": "circle"}
                )
                assert starts[i]["content_block"]["name"] == block["name"] == "count"


def test_errors_have_anthropic_s_form(running: Running) -> None:
    client = running.client
    for fields, status, kind in (
        ({"messages": QUESTION, "model": "tiny"}, 400, "invalid_request_error"),
        ({"messages": [], "max_tokens": 5}, 400, "invalid_request_error"),
        ({"messages": QUESTION, "max_tokens": 5, "model": "claude"}, 404, "not_found_error"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}], "max_tokens": 5}, 400, None),
    ):
        answer = client.post("/v1/messages", json=fields)
        assert answer.status_code == status and answer.json()["type"] == "error", answer.text
        assert kind is None or answer.json()["error"]["type"] == kind
    answer = client.post("/v1/messages", json={}, headers={"x-api-key": "wrong"})
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert "request-id" not in client.get("/v1/models").headers
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
