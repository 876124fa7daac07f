"""Errors name what the client sent, in every form of requests: not what the library is asked in its place."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("starlette")

from tests.serve.running import QUESTION, Running, until

BAD = "data:image/png;base64,AAAA"
LINK = {"type": "image_url", "image_url": {"url": BAD}}
INPUT_IMAGE = {"type": "input_image", "image_url": BAD}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
TEXT = {"type": "text", "text": "How many?"}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "3"}
EMPTY = {"role": "user", "content": " "}
LONG = "word " * 40000
UNHELD = {"type": "array", "uniqueItems": True}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("route", "fields", "named"),
    [
        ("chat/completions", {"messages": [*QUESTION, user(TEXT, LINK)]}, "messages[1].content[1]"),
        ("chat/completions", {"messages": [*QUESTION, EMPTY]}, "messages[1]"),
        (
            "chat/completions",
            {"messages": QUESTION, "structured_outputs": {"json": UNHELD}},
            "structured_outputs.json",
        ),
        (
            "chat/completions",
            {"messages": QUESTION, "response_format": {"type": "json_object", "schema": UNHELD}},
            "response_format",
        ),
        ("messages", {"system": "x", "messages": [*QUESTION, user(RESULT, TEXT, BLOCK)]}, "messages[1].content[2]"),
        (
            "messages",
            {"messages": [*QUESTION, user(TEXT, {**RESULT, "content": [TEXT, BLOCK]})]},
            "messages[1].content[1].content[1]",
        ),
        ("messages", {"system": "x", "messages": [*QUESTION, EMPTY]}, "messages[1]"),
        ("messages", {"system": "x", "messages": [{"role": "user", "content": LONG}]}, "messages"),
        (
            "messages",
            {"messages": QUESTION, "output_config": {"format": {"type": "json_schema", "schema": UNHELD}}},
            "output_config.format",
        ),
        (
            "messages",
            {"messages": QUESTION, "tools": [{"name": "f", "input_schema": UNHELD}], "tool_choice": {"type": "any"}},
            "tools",
        ),
        ("messages/count_tokens", {"system": "x", "messages": [*QUESTION, EMPTY]}, "messages[1]"),
        ("responses", {"instructions": "x", "input": [*QUESTION, user(INPUT_IMAGE)]}, "input[1].content[0]"),
        ("responses", {"instructions": "x", "input": [*QUESTION, EMPTY]}, "input[1]"),
        ("responses", {"input": [*QUESTION, CALL]}, "input[1].arguments"),
        ("responses", {"input": " "}, "input"),
        ("responses", {"input": LONG}, "input"),
        (
            "responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "a", "schema": UNHELD}}},
            "text.format",
        ),
        ("completions", {"prompt": LONG}, "prompt"),
        ("completions", {"prompt": ["x", LONG]}, "prompt[1]"),
        ("completions", {"prompt": [999999], "n": 2}, "prompt"),
        ("completions", {"prompt": [[5], [999999]], "n": 2}, "prompt[1]"),
        ("embeddings", {"input": ["x", LONG]}, "input[1]"),
        ("embeddings", {"input": [[5], [999999]]}, "input[1]"),
        ("embeddings", {"input": [999999]}, "input"),
    ],
)
def test_errors_name_the_client_s_field(running: Running, route: str, fields: dict[str, Any], named: str) -> None:
    more = {"max_tokens": 4} if route == "messages" else {}
    answer = running.client.post(f"/v1/{route}", json={**fields, **more})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, named), error
    assert "message 1" not in error["message"]


def test_what_a_response_continues_is_named_as_such(running: Running) -> None:
    """A picture of an earlier turn that is read again."""
    client = running.client
    first = client.post("/v1/responses", json={"input": "x"}).json()
    stored = running.server.service.store.get(first["id"])
    assert stored is not None
    stored.input[0]["content"].append(INPUT_IMAGE)
    running.server.service.store.put(stored)
    body = {"input": [{"role": "user", "content": "y"}], "previous_response_id": first["id"]}
    error = client.post("/v1/responses", json=body).json()["error"]
    assert error["param"] == "previous_response_id", error


@pytest.mark.parametrize(("route", "field"), [("embeddings", "input"), ("completions", "prompt")])
def test_no_reply_is_waited_for_when_another_fails(running: Running, route: str, field: str) -> None:
    running.client.get("/health")
    until(lambda: running.num_tasks == 1)  # uvicorn's own
    for _ in range(3):
        assert running.client.post(f"/v1/{route}", json={field: [[999999], [5] * 3000, [6] * 3000]}).status_code == 400
    until(lambda: running.num_tasks == 1 and running.is_idle())
