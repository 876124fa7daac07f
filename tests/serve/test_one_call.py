"""Who asks for one tool call at a time gets one, by every protocol, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from tests.serve.running import QUESTION, Running  # noqa: E402

PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"name": "count", "parameters": PARAMETERS}
SCHEMA = {"const": [{"name": "count", "parameters": {"n": n}} for n in range(3)]}
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
CHAT = {"messages": QUESTION, "tools": [{"type": "function", "function": TOOL}], "response_format": FORM}
RESPONSE = {
    "input": QUESTION,
    "tools": [{"type": "function", **TOOL}],
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
}
MESSAGE = {
    "messages": QUESTION,
    "max_tokens": 200,
    "tools": [{"name": "count", "input_schema": PARAMETERS}],
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
}
ONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": (CHAT, {"parallel_tool_calls": False}),
    "/v1/responses": (RESPONSE, {"parallel_tool_calls": False}),
    "/v1/messages": (MESSAGE, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
}


@pytest.mark.parametrize("route", ONE)
def test_the_reply_ends_with_its_first_call(running: Running, monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    monkeypatch.setattr("llama4.options.free_call", lambda tools: None)  # the form says several calls
    body, one = ONE[route]
    several = running.client.post(route, json=body)
    assert several.status_code == 200, several.text
    single = running.client.post(route, json={**body, **one})
    pieces = running.client.post(route, json={**body, **one, "stream": True})
    reasons = {"/v1/chat/completions": '"finish_reason":"tool_calls"', "/v1/messages": '"stop_reason":"tool_use"'}
    assert reasons.get(route, '"status":"completed"') in single.text and reasons.get(route, "completed") in pieces.text
    assert [numbers(answer) for answer in (several, single, pieces)] == [[0, 1, 2], [0], [0]]
    spent = [tokens(answer.json()["usage"]) for answer in (several, single)]
    assert spent[1] < spent[0]


def tokens(usage: dict[str, int]) -> int:
    return usage.get("completion_tokens") or usage["output_tokens"]


def numbers(answer: Any) -> list[int]:
    """The arguments of the calls that an answer, or its events, tell; each once."""
    found: list[int] = []

    def look(value: Any) -> None:
        if isinstance(value, dict) and isinstance(value.get("n"), int):
            found.append(value["n"])
        elif isinstance(value, dict):
            for name, each in value.items():
                if name in ("text", "tools"):  # what was asked for
                    continue
                look(json.loads(each) if name in ("arguments", "partial_json") and each else each)
        elif isinstance(value, list):
            for each in value:
                look(each)

    for line in answer.text.splitlines():
        text = line.removeprefix("data: ")
        if text.startswith("{"):
            look(json.loads(text))
    return sorted(set(found))
