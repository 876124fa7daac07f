"""A tool call that must come and is cut off is told as far as it came, by every protocol, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from llama4 import Llama4  # noqa: E402
from llama4.text.tool_calls import CutCall, ToolCall, WholeCallReader  # noqa: E402
from tests.serve.running import QUESTION, Running  # noqa: E402

SHAPE = "a circle, a square, a circle, a square"
PARAMETERS = {"type": "object", "properties": {"shape": {"const": SHAPE}}, "required": ["shape"]}
TOOL = {"name": "count", "parameters": PARAMETERS}
WHOLE = json.dumps({"shape": SHAPE})
CHAT: dict[str, Any] = {"messages": QUESTION, "tools": [{"type": "function", "function": TOOL}]}
NAMED = {"type": "function", "function": {"name": "count"}}
RESPONSE = {"input": QUESTION, "tools": [{"type": "function", **TOOL}], "tool_choice": "required"}
MESSAGE = {
    "messages": QUESTION,
    "tools": [{"name": "count", "input_schema": PARAMETERS}],
    "tool_choice": {"type": "any"},
}


@pytest.fixture(scope="module")
def limit(llm: Llama4) -> int:
    """Tokens of half a call."""
    reply = llm.chat(QUESTION, tools=CHAT["tools"], tool_choice="required")
    assert reply.tool_calls and reply.cut_call is None
    return reply.usage.completion_tokens - len(llm.tokenizer.encode(SHAPE)) // 2


def events(running: Running, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = running.client.post(route, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]


def is_begun(arguments: str) -> bool:
    return WHOLE.startswith(arguments) and len('{"shape": "') < len(arguments) < len(WHOLE)


def test_in_python(llm: Llama4, limit: int) -> None:
    for choice in ("required", NAMED):
        asked: dict[str, Any] = {"tools": CHAT["tools"], "tool_choice": choice}
        reply = llm.chat(QUESTION, **asked, max_new_tokens=limit)
        assert (reply.text, reply.tool_calls, reply.finish_reason) == ("", [], "length")
        assert reply.cut_call and reply.cut_call.name == "count" and is_begun(reply.cut_call.arguments)
        unnamed = llm.chat(QUESTION, **asked, max_new_tokens=2)
        assert unnamed.cut_call is None and unnamed.text and '{"name": "count'.startswith(unnamed.text)


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_of_chats(running: Running, limit: int, choice: Any) -> None:
    body = {**CHAT, "tool_choice": choice, "max_tokens": limit}
    (whole,) = running.ask(**body)["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "length" and whole["message"]["content"] is None
    assert call["function"]["name"] == "count" and is_begun(call["function"]["arguments"])
    choices = [event["choices"][0] for event in events(running, "/v1/chat/completions", body)]
    told = [each for choice in choices for each in choice["delta"].get("tool_calls", ())]
    assert [each["function"] for each in told] == [call["function"]] and choices[-1]["finish_reason"] == "length"


def test_of_responses(running: Running, limit: int) -> None:
    body = {**RESPONSE, "max_output_tokens": limit}
    whole = running.client.post("/v1/responses", json=body).json()
    (item,) = whole["output"]
    assert whole["status"] == item["status"] == "incomplete"
    assert (item["type"], item["name"]) == ("function_call", "count") and is_begun(item["arguments"])
    last = events(running, "/v1/responses", body)[-1]
    (streamed,) = last["response"]["output"]
    assert last["type"] == "response.incomplete" and streamed["arguments"] == item["arguments"]


def test_of_messages(running: Running, limit: int) -> None:
    """An input that is no whole object is none; its pieces come as they are."""
    body = {**MESSAGE, "max_tokens": limit}
    whole = running.client.post("/v1/messages", json=body).json()
    (block,) = whole["content"]
    assert whole["stop_reason"] == "max_tokens"
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "count", {})
    told = events(running, "/v1/messages", body)
    (piece,) = [event["delta"]["partial_json"] for event in told if event["type"] == "content_block_delta"]
    assert is_begun(piece)
    assert [event["delta"]["stop_reason"] for event in told if event["type"] == "message_delta"] == ["max_tokens"]


def test_a_response_with_a_cut_call_is_continued(running: Running, limit: int) -> None:
    first = running.client.post("/v1/responses", json={**RESPONSE, "max_output_tokens": limit}).json()
    now = {"role": "user", "content": "And now?"}
    for body in ({"input": "And now?", "previous_response_id": first["id"]}, {"input": [*first["output"], now]}):
        answer = running.client.post("/v1/responses", json=body | {"max_output_tokens": 2})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_an_identity_that_is_no_address(running: Running, choice: str) -> None:
    broken = {"$id": "http://[", "type": "object"}
    function = {"name": "f", "parameters": broken if choice == "required" else {}}
    body = {"messages": QUESTION, "tools": [{"type": "function", "function": function}], "tool_choice": choice}
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": broken}}}
    answer = running.client.post("/v1/chat/completions", json=body | (form if choice == "auto" else {}))
    assert answer.status_code == 400 and "no address" in answer.text


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"enum": [{"name": "count", "reason": "it counts"}]}, '{"name": "count", "reason": "it counts"}'),
        ({"enum": [[{"name": "count"}, {"name": "count"}]]}, '[{"name": "count"}, {"name": "count"}]'),
        ({"enum": [{"a": {"name": "count", "parameters": {}}}]}, '{"a": {"name": "count", "parameters": {}}}'),
    ],
)
def test_a_form_that_names_a_tool_is_no_call(
    llm: Llama4, monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any], text: str
) -> None:
    """Nor what stands within it, whole or cut off."""
    monkeypatch.setattr("llama4.options.free_call", lambda tools: schema)  # so that it is not the call
    reply = llm.chat(QUESTION, tools=CHAT["tools"], response_format=schema)
    assert (reply.text, reply.tool_calls, reply.parsed) == (text, [], schema["enum"][0])
    cut = llm.chat(QUESTION, tools=CHAT["tools"], response_format=schema, max_new_tokens=9)
    assert text.startswith(cut.text) and cut.text and not cut.tool_calls and cut.finish_reason == "length"


def test_a_call_is_told_whole_with_calls_in_its_arguments() -> None:
    reader = WholeCallReader(["count", "search"])
    text = '{"name": "count", "parameters": {"steps": [{"name": "search", "parameters": {}}, {"na'
    assert [reader.push(character) for character in text] == [[]] * len(text)
    assert reader.finish() == [CutCall("count", text.partition('"parameters": ')[2])]
    reader = WholeCallReader(["count"])
    assert [*reader.push('{"name": "co"'), *reader.push(', "a": 1}'), *reader.finish()] == [
        '{"name": "co"',
        ', "a": 1}',
    ]
    reader = WholeCallReader(["count"])
    assert not reader.push('{"name": "count", "parameters": {"a": [1]}}')
    assert reader.finish() == [ToolCall("count", {"a": [1]})]
