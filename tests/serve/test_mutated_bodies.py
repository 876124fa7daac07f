"""Requests as nobody writes them: each is answered as /openapi.json says, none by an error of the server. LLAMA4_FUZZ
sets how many."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llama4 import Llama4
from llama4.serve.app import Settings
from tests.serve.running import QUESTION, Running, until

COUNT = int(os.environ.get("LLAMA4_FUZZ", "100"))
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
FUNCTION = {"name": "count", "description": "Counts.", "parameters": SCHEMA}
PARTS = [
    {"type": "text", "text": "How many?"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
]
CALLS = [{"id": "a1", "type": "function", "function": {"name": "count", "arguments": '{"n": 1}'}}]
COMMON: dict[str, Any] = {"model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"]}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {**COMMON, "messages": QUESTION, "n": 2, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}},
        {**COMMON, "messages": [{"role": "user", "content": PARTS}], "stream": True, "stream_options": {}},
        {
            **COMMON,
            "messages": [
                *QUESTION,
                {"role": "assistant", "content": None, "tool_calls": CALLS},
                {"role": "tool", "tool_call_id": "a1", "content": "3"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "count"}},
        },
        {**COMMON, "messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ],
    "/v1/completions": [
        {**COMMON, "prompt": ["Once", "Twice"], "echo": True},
        {**COMMON, "prompt": [[1, 2, 3]], "logprobs": 2, "structured_outputs": {"regex": "[ab]+"}},
    ],
    "/v1/responses": [
        {
            "model": "tiny",
            "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "max_output_tokens": 16,
            "tools": [{"type": "function", **FUNCTION}],
            "text": {"format": {"type": "text"}},
        }
    ],
    "/v1/messages": [
        {
            "model": "tiny",
            "max_tokens": 2,
            "system": "Be brief.",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "tools": [{"name": "count", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto"},
        }
    ],
    "/v1/messages/count_tokens": [{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}],
    "/v1/embeddings": [{"model": "tiny", "input": ["Hi", "Ho"], "encoding_format": "float"}],
    "/tokenize": [{"prompt": "Hello"}, {"messages": QUESTION}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
    "/apply-template": [{"messages": QUESTION}],
}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1e308, -0.5, 10**30, "", " ", "\x00", "\ud83d", "é" * 500),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        [[[[[[]]]]]],
        "auto",
        "null",
        "file:///etc/passwd",
        "http://127.0.0.1/",
        "{{x}}",
    ),
    *(
        {"type": "text"},
        {"type": "object"},
        {"$ref": "#"},
        {"role": "user"},
        [{"role": "user", "content": "x"}],
        "(?=a)",
    ),
]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    server = Running(Llama4.from_pretrained("tiny", progress=False), Settings("tiny"), cache_memory="4MiB")
    yield server
    server.close()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Everything inside JSON: (what holds it, its key or index)."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [each for key in keys for each in ((value, key), *places(value[key]))]


def mutated(body: dict[str, Any], draw: random.Random) -> bytes:
    """With some values replaced, removed, copied elsewhere or renamed; now and then with bytes that are no JSON."""
    body = copy.deepcopy(body)
    for _ in range(draw.choice((1, 1, 2, 4))):
        found = places(body)
        holder, key = draw.choice(found) if found else (body, "x")
        how = draw.random()
        if how < 0.55 or (key not in holder and isinstance(holder, dict)):
            holder[key] = copy.deepcopy(draw.choice(ODD))
        elif how < 0.7:
            del holder[key]
        elif how < 0.85:
            other, place = draw.choice(found)
            holder[key] = copy.deepcopy(other[place])
        elif isinstance(holder, dict):
            holder[draw.choice(["", "type", "x" * 300, "messages", "$defs"])] = holder.pop(key)
    data = bytearray(json.dumps(body).encode())
    if draw.random() < 0.15 and data:
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.05 else data)


def test_mutated_bodies(running: Running) -> None:
    paths = running.client.get("/openapi.json").json()["paths"]
    posts = [path for path in paths if "post" in paths[path] and path in BODIES]
    assert len(posts) >= 5 and {path for path in paths if "post" in paths[path] and "{" not in path} <= set(BODIES)
    draw, statuses = random.Random(7), dict.fromkeys(posts, 0)
    for i in range(COUNT):
        path = posts[i % len(posts)]
        content = mutated(draw.choice(BODIES[path]), draw)
        answer = running.client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code != 500, content
        assert str(answer.status_code) in paths[path]["post"]["responses"], (answer.status_code, content)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"], content
            statuses[path] += 1
        if "event-stream" in answer.headers.get("content-type", ""):
            assert '"server_error"' not in answer.text, content
    assert all(count > 0 for count in statuses.values())
    until(running.is_idle)


def test_what_is_mutated_is_valid(running: Running) -> None:
    served = running.client.get("/openapi.json").json()["paths"]
    for path in sorted(set(BODIES) & set(served)):
        for body in BODIES[path]:
            answer = running.client.post(path, json=body)
            assert answer.status_code == 200, (path, body, answer.text)
